"""Pruning against merging: loss, answers among four, and what greedy text reads like."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from math import exp
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from experiments import generation, rows
from experiments.generation import Changed
from experiments.measures import Interval, over_seeds, wilson
from experiments.reading import (
    OURS,
    PAPER,
    Data,
    at,
    cells,
    claim,
    models,
    percent,
    shown,
    table,
)
from experiments.setting import MAIN, Setting
from experiments.subject import Subject, increases
from experiments.texts import DOMAINS
from reap.merging.choosing import make_merge
from reap.merging.mergeplan import Merge
from reap.merging.similarity import router_similarity
from reap.merging.tying import merged
from reap.planning.plan import Plan
from reap.report.style import Theme, themed
from reap.runs.evaluation import evaluate
from reap.runs.masking import masked

RATIOS = (0.25, 0.5)
TALKING = 0.5  # the ratio at which text is generated
MERGED = ("hc-smoe", "m-smoe")
METHODS = (*MAIN, *MERGED)


def keys(setting: Setting) -> list[str]:
    return [str(seed) for seed in range(setting.seeds)]


def cell(subject: Subject, key: str) -> Any:
    """{"original": text, "method@ratio": losses and at TALKING text}. Prompts and questions are
    those of the seed."""
    seed = int(key)
    found: dict[str, Any] = {"original": talk(subject, seed, nullcontext)}
    made = variants(subject, seed)
    plans = {name: how for name, (_, how) in made.items() if isinstance(how, Plan)}
    losses = subject.measured(plans)
    for name, (changed, _) in made.items():
        if name not in plans:
            with changed():
                both = evaluate(subject.model, subject.held_out(), teacher=subject.original)
            losses[name] = increases(both)
        found[name] = {"losses": losses[name]}
        if name.endswith(f"@{TALKING}"):
            found[name] |= talk(subject, seed, changed)
    return found


def variants(subject: Subject, seed: int) -> dict[str, tuple[Changed, Plan | Merge]]:
    """By "method@ratio": inside of what the model is pruned or merged, and how."""
    stats = subject.mix(seed)
    similarity = router_similarity(subject.folder, stats.model)
    found: dict[str, tuple[Changed, Plan | Merge]] = {}
    for ratio in RATIOS:
        for criterion in MAIN:
            plan = subject.plan(stats, criterion, ratio)
            found[f"{criterion}@{ratio}"] = (partial(masked, subject.model, plan), plan)
        for method in MERGED:
            alike = similarity if method == "m-smoe" else None
            merge = make_merge(stats, method, ratio=str(ratio), similarity=alike)
            found[f"{method}@{ratio}"] = (partial(merged, subject.model, merge), merge)
    return found


def talk(subject: Subject, seed: int, changed: Changed) -> dict[str, Any]:
    """What the model says inside `changed`, and how many questions it answers."""
    setting, model = subject.setting, subject.model
    end = model.config.eos_token_id
    tokenizer = subject.tokenizer
    prompts = rows.prompts(tokenizer, seed, setting.prompts, setting.prompt_tokens)
    length = setting.prompt_tokens + setting.answer_tokens
    asked = rows.prompts(tokenizer, seed, setting.questions, length)
    with changed():
        texts = generation.greedy(model, prompts, setting.new_tokens)
        right = generation.right_answers(model, asked, setting.answer_tokens, setting.questions)
    some = slice(None, None, max(1, len(prompts) // (setting.scored * len(DOMAINS))))
    return {
        **generation.read(texts, end),
        **generation.compared(model, changed, prompts[some], texts[some], end),
        "questions": len(asked),
        "right": right,
    }


def loss(found: list[Any], name: str, what: str = "loss") -> Interval:
    return at(found, name, "losses", "total", what)


def share(found: list[Any], name: str, what: str, of: str = "texts") -> Interval:
    """Of the texts (or questions) of all seeds together."""
    return wilson(sum(c[name][what] for c in found), sum(c[name][of] for c in found))


def divergence(found: list[Any], name: str) -> list[float]:
    """By position, mean over the seeds."""
    return [mean(values) for values in zip(*(c[name]["divergence"] for c in found), strict=True)]


def report(data: Data) -> list[str]:
    lines = ["Loss increase and divergence from the original on held-out text, nats per token:", ""]
    quiet = []
    for model in models(data):
        found = cells(data, model)
        for ratio in RATIOS:
            for method in METHODS:
                name = f"{method}@{ratio}"
                both = [shown(loss(found, name)), shown(loss(found, name, "kl"), signed=False)]
                quiet.append([model, f"{ratio:.0%}", method, *both])
    lines += table(["model", "dropped or merged", "method", "loss increase", "KL"], quiet)
    setting = data["setting"]
    lines += [
        f"Greedy text of {setting['new_tokens']} tokens behind {setting['prompt_tokens']} of",
        f"held-out text, {TALKING:.0%} dropped or merged, all seeds together; shares with Wilson's",
        "95% interval. `loops`: texts that end in a repetition. `cross`: perplexity of the text",
        "under the original model. `JSD`: mean over the positions, in nats. `answers`: questions",
        "of which the true continuation is the likeliest of four.",
        "",
    ]
    rows = []
    for model in models(data):
        found = cells(data, model)
        for name in ("original", *(f"{method}@{TALKING}" for method in METHODS)):
            grams = [
                f"{mean(c[name]['distinct'][str(n)] for c in found):.3f}" for n in generation.GRAMS
            ]
            rows.append(
                [
                    model,
                    name.partition("@")[0],
                    str(sum(c[name]["texts"] for c in found)),
                    percent(share(found, name, "loops")),
                    percent(share(found, name, "ended")),
                    *grams,
                    f"{exp(mean(c[name]['cross_loss'] for c in found)):.2f}",
                    f"{mean(divergence(found, name)):.3f}",
                    percent(share(found, name, "right", "questions")),
                ]
            )
    grams = [f"distinct {n}" for n in generation.GRAMS]
    head = ["model", "method", "texts", "loops", "ended", *grams, "cross", "JSD", "answers"]
    return lines + table(head, rows)


def claims(data: Data) -> list[list[str]]:
    rows = []
    for model in models(data):
        found = cells(data, model)
        for other in MERGED:
            ours, theirs = f"reap@{TALKING}", f"{other}@{TALKING}"
            for what, (whose, value) in COMPARED.items():
                pair = over_seeds([value(c[ours]) - value(c[theirs]) for c in found])
                text = f"{what}: REAP is better than {other} at {TALKING:.0%}"
                rows.append(claim(text, whose, model, pair))
    return rows


COMPARED: dict[str, tuple[str, Callable[[Any], float]]] = {  # whose claim it is; less is better
    "loss": (OURS, lambda entry: entry["losses"]["total"]["loss"]),
    "share of texts that loop": (OURS, lambda entry: entry["loops"] / entry["texts"]),
    "repeated 4-grams": (PAPER, lambda entry: 1 - entry["distinct"]["4"]),
    "cross-perplexity, as a loss": (PAPER, lambda entry: entry["cross_loss"]),
    "divergence on own text": (PAPER, lambda entry: mean(entry["divergence"])),
    "wrong answers among four": (OURS, lambda entry: 1 - entry["right"] / entry["questions"]),
}


@themed
def figure(theme: Theme, data: Data) -> Figure:
    """Divergence by position, and the share of texts that loop."""
    names = models(data)
    drawn = Figure(figsize=(8, 5.6), layout="constrained")
    panels = drawn.subplots(2, len(names), squeeze=False)
    for (top, bottom), model in zip(panels.T, names, strict=True):
        found = cells(data, model)
        for number, method in enumerate(METHODS):
            values = divergence(found, f"{method}@{TALKING}")
            top.plot(range(1, len(values) + 1), values, color=theme.series[number], label=method)
        top.set_title(f"{model}, {TALKING:.0%} dropped or merged")
        top.set_xlabel("position in the generated text")
        top.set_ylabel("JSD from the original, nats")
        bars = ("original", *METHODS)
        shares = [share(found, m if m == "original" else f"{m}@{TALKING}", "loops") for m in bars]
        bottom.barh(
            bars,
            [100 * s.middle for s in shares],
            xerr=[
                [100 * (s.middle - s.low) for s in shares],
                [100 * (s.high - s.middle) for s in shares],
            ],
            color=[theme.muted, *theme.series[: len(METHODS)]],
            ecolor=theme.ink,
        )
        bottom.invert_yaxis()
        bottom.set_xlabel("texts that end in a loop, %")
    lines = panels[0, 0].get_lines()
    drawn.legend(lines, METHODS, loc="outside upper center", ncols=len(METHODS))
    return drawn
