"""What it costs to merge, or to prune, one of two experts, in numbers.

With gates g (0 where the router did not choose an expert), outputs f, D = f_i - f_j, r = g_i / (g_i
+ g_j) and means E over tokens (arXiv 2510.13999, section 3):

- merging both into the best constant mix, alpha = E[r], costs E[(g_i + g_j)^2 (r - alpha)^2 |D|^2],
  which the paper takes to be about E[(g_i + g_j)^2] Var[r] E|D|^2;
- pruning j with i in its place costs E[g_j^2 |D|^2], at most E[g_j^2 (|f_j| + |f_i|)^2];
- pruning j and sharing its gate out over the token's other experts, in proportion to theirs, costs
  the mean square of what the layer's output changes by.

All are mean squares of a change of the layer's output. These judge merging in the space of
functions, by the best mix of two outputs that a constant can make. The expert that a merge really
makes has the mean of two experts' weights: what that costs is measured beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Records(NamedTuple):
    """Of slots i and j of one token, where expert i < expert j, each [R]; sizes are fp64."""

    experts: Tensor  # [R,2] int64
    gates: Tensor  # [R,2]
    norms: Tensor  # [R,2] ||f||
    apart: Tensor  # [R] ||f_i - f_j||^2
    shared: Tensor  # [R,2] squared change when that expert goes and the others take its gate


@dataclass(frozen=True)
class Costs:
    """Of one pair over some tokens. Of two numbers the first is of the expert with the lower id."""

    tokens: int
    alpha: float  # E[r], r the first one's share of their gates
    spread: float  # Var[r]
    merge: float  # measured
    merge_predicted: float  # E[(g_i+g_j)^2] Var[r] E|D|^2
    prune: tuple[float, float]  # measured, the other in its place
    prune_bound: tuple[float, float]  # E[g_j^2 (|f_j| + |f_i|)^2]


@dataclass(frozen=True)
class PairErrors:
    """Two experts: over the tokens that chose `both`, which the paper's argument is about, and over
    those that chose `either`, which are all that notice. `prune_shared` is over both: measured, all
    others of the token in its place. `merge_weights` is over either: measured, with the mean of
    their weights, by their tokens, in place of both; None where weights have no mean (quantised,
    or differing in shape)."""

    experts: tuple[int, int]
    both: Costs
    either: Costs
    prune_shared: tuple[float, float]
    merge_weights: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def costs_of(gates: Tensor, norms: Tensor, apart: Tensor) -> Costs:
    """gates and norms [R,2], apart [R], as of `Records`; no token without any gate."""
    total = gates.sum(1)
    r = gates[:, 0] / total
    weight = total.square()
    alpha = r.mean()
    spread = (r - alpha).square().mean()
    return Costs(
        tokens=len(r),
        alpha=float(alpha),
        spread=float(spread),
        merge=float((weight * (r - alpha).square() * apart).mean()),
        merge_predicted=float(weight.mean() * spread * apart.mean()),
        prune=_two((gates.square() * apart[:, None]).mean(0)),
        prune_bound=_two((gates * norms.sum(1, keepdim=True)).square().mean(0)),
    )


def _two(values: Tensor) -> tuple[float, float]:
    first, second = values.tolist()
    return first, second


def records_of(outputs: Tensor, ids: Tensor, gates: Tensor, experts: int) -> Records:
    """Every pair of slots of every token, from the slots' outputs [K,T,H] fp64, ids [T,K] and gates
    [T,K]. Slots of no expert (id >= `experts`) are in none, nor are pairs of one expert or without
    any gate."""
    K = len(outputs)
    real = ids < experts
    weights = torch.where(real, gates.double(), 0)  # [T,K]
    gated = weights.T[..., None] * torch.where(real.T[..., None], outputs, 0)  # [K,T,H]
    whole = gated.sum(0)
    norms = torch.linalg.vector_norm(outputs, dim=2)  # [K,T]
    rest = weights.sum(1, keepdim=True) - weights  # [T,K]
    # What goes, less what the others gain by its gate; they gain nothing where they have no gate.
    factor = torch.where(rest > 0, weights / torch.where(rest > 0, rest, 1), 0)
    shared = torch.stack(
        [(gated[k] - factor[:, k : k + 1] * (whole - gated[k])).square().sum(1) for k in range(K)]
    )  # [K,T]
    found: list[Records] = []
    for a in range(K):
        for b in range(a + 1, K):
            chosen = real[:, a] & real[:, b] & (ids[:, a] != ids[:, b])
            chosen &= weights[:, a] + weights[:, b] > 0
            swap = (ids[:, a] > ids[:, b])[chosen]

            def pair(x: Tensor, y: Tensor, chosen: Tensor = chosen, swap: Tensor = swap) -> Tensor:
                two = torch.stack([x[chosen], y[chosen]], 1)
                return torch.where(swap[:, None], two.flip(1), two)

            found.append(
                Records(
                    pair(ids[:, a], ids[:, b]).long(),
                    pair(weights[:, a], weights[:, b]),
                    pair(norms[a], norms[b]),
                    (outputs[a] - outputs[b]).square().sum(1)[chosen],
                    pair(shared[a], shared[b]),
                )
            )
    return together(found)


def together(parts: Iterable[Records]) -> Records:
    """All of them as one, on the CPU."""
    columns = zip(*parts, strict=True)
    return Records(*(torch.cat([part.cpu() for part in column]) for column in columns))


def often(records: Records, *, least: int, most: int) -> dict[tuple[int, int], Records]:
    """By pair, in the order of their ids: those that at least `least` tokens chose, of which the
    `most` most often chosen (of equals the lower ids)."""
    pairs, inverse, counts = torch.unique(
        records.experts, dim=0, return_inverse=True, return_counts=True
    )
    order = sorted(range(len(pairs)), key=lambda i: (-int(counts[i]), i))[:most]
    place = inverse.argsort(stable=True).split(counts.tolist())
    return {
        (int(pairs[i, 0]), int(pairs[i, 1])): Records(*(x[place[i]] for x in records))
        for i in sorted(order)
        if counts[i] >= least
    }


def shared_costs(records: Records) -> tuple[float, float]:
    """`PairErrors.prune_shared` of one pair's records."""
    return _two(records.shared.mean(0))


def agreement(predicted: Iterable[float], measured: Iterable[float]) -> float | None:
    """How often two numbers are in the order that their predictions say, a tie counting half; two
    equal measurements say nothing. None where there is nothing to compare."""
    p = torch.tensor(list(predicted), dtype=torch.float64)
    m = torch.tensor(list(measured), dtype=torch.float64)
    right = asked = 0.0
    for i in range(len(m) - 1):
        differs = m[i + 1 :] != m[i]
        same = torch.sign(p[i + 1 :] - p[i]) * torch.sign(m[i + 1 :] - m[i])
        right += float((same[differs] + 1).sum()) / 2
        asked += float(differs.sum())
    return right / asked if asked else None


def summary_of(pairs: Iterable[PairErrors]) -> dict[str, Any]:
    """How two ways of removing one of two experts compare, over pairs; of `both` and of `either`
    each, as `PairErrors` has them:

    `merge`, `prune`: the mean measured error, of pruning by the cheaper of the two. `merge_wins`:
    the share of pairs in which merging costs less. `merge_order`, `prune_order`: how often the
    paper's formula orders two errors as they were measured. `merge_ratio`: the median of measured
    over predicted; `prune_ratio`: of measured over bound, at most 1. Of `both` also `prune_shared`
    and `merge_wins_shared`, where the token's other experts take the gate; of `either` also
    `merge_weights` and `merge_weights_wins`, where the mean of the weights stands for both. None
    where there is nothing to say.
    """
    found = list(pairs)
    shared = [min(pair.prune_shared) for pair in found]
    both = [pair.both for pair in found]
    either = [pair.either for pair in found]
    weights = [
        (pair.merge_weights, min(pair.either.prune))
        for pair in found
        if pair.merge_weights is not None
    ]
    return {
        "pairs": len(found),
        "both": {
            **_compared(both),
            "prune_shared": _mean(shared),
            "merge_wins_shared": _mean(
                [float(its.merge < other) for its, other in zip(both, shared, strict=True)]
            ),
        },
        "either": {
            **_compared(either),
            "merge_weights": _mean([cost for cost, _ in weights]),
            "merge_weights_wins": _mean([float(cost < other) for cost, other in weights]),
        },
    }


def _compared(costs: list[Costs]) -> dict[str, float | None]:
    merges = [(its.merge_predicted, its.merge) for its in costs]
    prunes = [two for its in costs for two in zip(its.prune_bound, its.prune, strict=True)]
    return {
        "merge": _mean([its.merge for its in costs]),
        "prune": _mean([min(its.prune) for its in costs]),
        "merge_wins": _mean([float(its.merge < min(its.prune)) for its in costs]),
        "merge_order": agreement(*_columns(merges)),
        "prune_order": agreement(*_columns(prunes)),
        "merge_ratio": _ratio(merges),
        "prune_ratio": _ratio(prunes),
    }


def _columns(rows: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [said for said, _ in rows], [measured for _, measured in rows]


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _ratio(rows: list[tuple[float, float]]) -> float | None:
    ratios = [measured / said for said, measured in rows if said > 0]
    return statistics.median(ratios) if ratios else None
