"""How many experts each layer keeps, searched: an exact budget, masked KL as the objective.

    python examples/budget_search.py models/tiny-qwen3-moe
    python examples/budget_search.py MODEL --data text.jsonl --total 2304 --out plan.json

The criterion says in which order a layer's experts go, the search how many of each layer. It begins
with the plan of `reap plan --scope global`. Then, a round at a time, it tries to move a few experts
of the budget from one layer to another. All tries of a round are masks over one loaded model, and
are compared with the whole model in one pass over the text (`reap.evaluate`); nothing is pruned
before the best plan is known. `reap prune MODEL plan.json OUT` writes it.

This is the smallest search that is worth its name. What follow-up work does better (evolution,
gradients on counts, other objectives) needs the same three calls: `make_plan`, `evaluate` with
plans, and `dataclasses.replace(plan, kept=...)`, which refuses what a router cannot do.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import reap


def order_of(layer: reap.LayerInfo, scores: list[float]) -> list[int]:
    """Expert ids in the order in which they stay: the best first, of each router group in turn."""
    ranked = sorted(range(layer.num_experts), key=lambda expert: (-scores[expert], expert))
    size = layer.num_experts // layer.n_group
    groups = [[e for e in ranked if e // size == group] for group in range(layer.n_group)]
    return [expert for row in zip(*groups, strict=True) for expert in row]


def with_counts(plan: reap.Plan, orders: Mapping[str, list[int]], counts: list[int]) -> reap.Plan:
    """The plan whose layers keep so many of their experts. ReapError where a router needs more."""
    kept = {
        name: tuple(sorted(order[:count]))
        for (name, order), count in zip(orders.items(), counts, strict=True)
    }
    return replace(plan, criterion=f"{plan.criterion}, counts searched", kept=kept)


def moves(counts: list[int], most: list[int], step: int, rng: random.Random) -> Iterator[list[int]]:
    """Neighbours with the same sum, in random order: `step` experts of one layer go to another."""
    pairs = [(i, j) for i in range(len(counts)) for j in range(len(counts)) if i != j]
    for i, j in rng.sample(pairs, len(pairs)):
        new = list(counts)
        new[i], new[j] = new[i] - step, new[j] + step
        if new[i] > 0 and new[j] <= most[j]:
            yield new


def search(
    model: Any,
    rows: Any,
    stats: reap.Statistics,
    *,
    total: int,
    criterion: str = "reap",
    step: int = 1,
    rounds: int = 8,
    tries: int = 8,
    seed: int = 0,
) -> tuple[reap.Plan, list[float]]:
    """The best plan found that keeps `total` experts, and the KL divergence (nats per token) of the
    best one after each round, the first plan's before them.

    `rows`: batches that can be read again. `step`: experts that change layers in a move, a multiple
    of the routers' groups.
    """
    plan = reap.make_plan(stats, criterion, scope="global", total=total, multiple_of=step)
    scores = reap.saliency(stats, criterion)
    layers = plan.model.layers
    orders = {layer.name: order_of(layer, scores[layer.name].tolist()) for layer in layers}
    most = [layer.num_experts for layer in layers]
    rng = random.Random(seed)
    best = plan
    found = [_divergence(reap.evaluate(model, rows, plans={"first": plan})["first"])]
    for _ in range(rounds):
        counts = [len(kept) for kept in best.kept.values()]
        plans: dict[str, reap.Plan] = {}
        for new in moves(counts, most, step, rng):
            try:
                plans[str(new)] = with_counts(plan, orders, new)
            except reap.ReapError:
                continue  # fewer than a router needs
            if len(plans) == tries:
                break
        if not plans:
            break
        results = reap.evaluate(model, rows, plans=plans)
        name = min(results, key=lambda name: _divergence(results[name]))
        if _divergence(results[name]) < found[-1]:
            best = plans[name]
            found.append(_divergence(results[name]))
        else:
            found.append(found[-1])
    return best, found


def _divergence(result: dict[str, reap.Evaluation]) -> float:
    kl = result["total"].kl
    assert kl is not None  # plans are compared with the whole model
    return kl


def main() -> None:
    parser = argparse.ArgumentParser(description="search how many experts each layer keeps")
    parser.add_argument("model")
    parser.add_argument("--data", action="append")
    parser.add_argument("--stats", help="of an earlier calibration; else the text is measured")
    parser.add_argument("--total", type=int, help="half of all experts by default")
    parser.add_argument("--out", help="the plan file to write")
    parser.add_argument("--criterion", default="reap")
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--seq-len", type=int, default=256)
    for name, value in (("step", 1), ("rounds", 4), ("tries", 4), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()

    from transformers import AutoTokenizer

    model = reap.load_model(given.model)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    size = {"seq_len": given.seq_len, "max_tokens": given.max_tokens}
    rows = list(reap.batches(given.data or ["stdlib:code"], tokenizer, **size))
    stats = reap.Statistics.load(given.stats) if given.stats else reap.calibrate(model, rows)
    experts = sum(layer.num_experts for layer in stats.model.layers)
    options = {name: getattr(given, name) for name in ("step", "rounds", "tries", "seed")}
    total = given.total or experts // 2
    plan, found = search(model, rows, stats, total=total, criterion=given.criterion, **options)
    print(f"KL {found[0]:.4f} -> {found[-1]:.4f} nats per token")
    print("experts per layer:", *map(len, plan.kept.values()))
    if given.out:
        plan.save(given.out)


if __name__ == "__main__":
    main()
