"""One plan for several domains: how statistics of each become one ranking."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments.measures import Interval, over_seeds
from experiments.reading import OURS, Data, at, cells, claim, interval, models, shown, table
from experiments.setting import Setting
from experiments.subject import Subject
from experiments.texts import DOMAINS
from reap.planning.counting import kept_counts
from reap.planning.criteria import rank, saliency
from reap.planning.plan import Plan, select
from reap.report.style import MARKERS, Theme, themed
from reap.statistics.stats import Statistics

RATIOS = (0.25, 0.5)
LARGE, SMALL = DOMAINS[0], 8  # the other domains have an eighth of this one's text
Scores = list[Tensor]  # of one layer, [E] per domain, each with the mean 1
COMBINED: dict[str, Callable[[Scores], Tensor]] = {
    "mean of domains": lambda scores: torch.stack(scores).mean(0),
    "best of domains": lambda scores: torch.stack(scores).amax(0),
}
RECIPES = ("even text", "uneven text", *COMBINED)


def keys(setting: Setting) -> list[str]:
    return [str(seed) for seed in range(setting.seeds)]


def cell(subject: Subject, key: str) -> Any:
    """{"recipe@ratio": {domain: loss increase}}. All but "even text" have uneven text."""
    few = max(subject.setting.seq_len, subject.setting.calibration_tokens // SMALL)
    parts = [subject.sample(d, int(key), None if d == LARGE else few) for d in DOMAINS]
    uneven = Statistics.total(parts)
    plans = {}
    for ratio in RATIOS:
        plans[f"even text@{ratio}"] = subject.plan(subject.mix(int(key)), "reap", ratio)
        plans[f"uneven text@{ratio}"] = subject.plan(uneven, "reap", ratio)
        for name, combine in COMBINED.items():
            plans[f"{name}@{ratio}"] = combined(parts, combine, ratio)
    losses = subject.measured(plans)
    return {name: {d: v["loss"] for d, v in by.items()} for name, by in losses.items()}


def combined(parts: list[Statistics], combine: Callable[[Scores], Tensor], ratio: float) -> Plan:
    """A plan by REAP's scores of each domain, in units of the layer's mean, combined."""
    model = reduce(lambda a, b: a + b, parts).model
    scores = [saliency(part, "reap") for part in parts]
    kept = {}
    counts = kept_counts(model.layers, ratio=str(ratio), keep=None, multiple_of=1)
    for layer, count in zip(model.layers, counts, strict=True):
        each = [by_layer[layer.name] for by_layer in scores]
        ranked = rank(combine([score / score.mean() for score in each]))
        kept[layer.name] = select(layer, ranked, count, ())
    return Plan(model, "reap", 0, kept, {"ratio": str(ratio)})


def worst(cell: Any, plan: str) -> float:
    return max(cell[plan][domain] for domain in DOMAINS)


def report(data: Data) -> list[str]:
    lines = [
        "Loss increase by REAP, at most in any domain and per domain. Text is even (as much of",
        f"each domain) or uneven ({LARGE} {SMALL} times as much as each other): of the uneven text",
        "either all tokens count alike, or each domain's scores, in units of the layer's mean, are",
        "averaged, or the best of them taken.",
        "",
    ]
    rows = []
    for model in models(data):
        found = cells(data, model)
        for ratio in RATIOS:
            for recipe in RECIPES:
                plan = f"{recipe}@{ratio}"
                values = [over_seeds([worst(c, plan) for c in found])]
                values += [at(found, plan, domain) for domain in DOMAINS]
                rows.append([model, f"{ratio:.0%}", recipe, *(shown(value) for value in values)])
    return lines + table(["model", "dropped", "recipe", "worst domain", *DOMAINS], rows)


def claims(data: Data) -> list[list[str]]:
    rows = []
    for model in models(data):
        found = cells(data, model)
        for recipe in ("even text", "mean of domains"):
            pair = gain(found, recipe)
            text = f"at 50% the worst domain loses less by {recipe} than by uneven text"
            rows.append(claim(text, OURS, model, pair))
    return rows


def gain(found: list[Any], recipe: str) -> Interval:
    return interval(found, lambda c: worst(c, f"{recipe}@0.5") - worst(c, "uneven text@0.5"))


@themed
def figure(theme: Theme, data: Data) -> Figure:
    """What each recipe costs each domain, half of the experts dropped."""
    names = models(data)
    drawn = Figure(figsize=(8, 3.4), layout="constrained")
    panels = drawn.subplots(1, len(names), squeeze=False)[0]
    for axes, model in zip(panels, names, strict=True):
        found = cells(data, model)
        for number, recipe in enumerate(RECIPES):
            plan = f"{recipe}@0.5"
            values = [at(found, plan, domain) for domain in DOMAINS]
            axes.errorbar(
                [place + 0.15 * (number - 1.5) for place in range(len(DOMAINS))],
                [value.middle for value in values],
                [value.high - value.middle for value in values],
                fmt=MARKERS[number],
                color=theme.series[number],
                label=recipe,
            )
        axes.set_xticks(range(len(DOMAINS)), DOMAINS)
        axes.set_ylabel("loss increase, nats per token")
        axes.set_title(f"{model}, 50% dropped")
        axes.set_ylim(bottom=0)
        axes.legend()
    return drawn
