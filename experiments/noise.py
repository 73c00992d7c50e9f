"""The noise floor: how far results move when only the sample of text is another."""

from __future__ import annotations

from itertools import combinations
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from experiments.measures import over_seeds, overlap
from experiments.reading import Data, between, cells, models, shown, table
from experiments.setting import MAIN, Setting
from experiments.subject import Subject
from reap.report.style import MARKERS, Theme, themed

RATIOS = (0.25, 0.5)
PARTS = 4  # of every domain's held-out text


def keys(setting: Setting) -> list[str]:
    return [str(seed) for seed in range(setting.noise_seeds)]


def cell(subject: Subject, key: str) -> Any:
    """Per plan the experts that go, and what that costs on every part of the held-out text."""
    stats = subject.mix(int(key))
    plans = {f"{c}@{r}": subject.plan(stats, c, r) for c in MAIN for r in RATIOS}
    losses = subject.measured(plans, parts=min(PARTS, subject.setting.rows))
    return {
        name: {
            "dropped": [list(experts) for experts in plan.dropped.values()],
            "increase": {part: value["loss"] for part, value in losses[name].items()},
        }
        for name, plan in plans.items()
    }


def agreement(found: list[Any], plan: str) -> float:
    """Mean Jaccard overlap of the experts that two seeds drop in a layer."""
    layers = range(len(found[0][plan]["dropped"]))
    return mean(
        overlap(set(a[plan]["dropped"][layer]), set(b[plan]["dropped"][layer]))
        for a, b in combinations(found, 2)
        for layer in layers
    )


def by_part(found: list[Any], first: str, second: str) -> list[float]:
    """The difference of two plans on every part of the text, mean over seeds."""
    parts = [part for part in found[0][first]["increase"] if part != "total"]
    return [
        mean(c[first]["increase"][part] - c[second]["increase"][part] for c in found)
        for part in parts
    ]


def report(data: Data) -> list[str]:
    lines = [
        "Only the sample of calibration text changes between seeds. `overlap`: experts that two",
        "seeds drop in a layer, common ones as a share of all. `text`: the difference to `ean`",
        "with its interval over parts of the held-out text in place of seeds.",
        "",
    ]
    rows = []
    for model in models(data):
        found = cells(data, model)
        for ratio in RATIOS:
            for criterion in MAIN:
                plan, other = f"{criterion}@{ratio}", f"ean@{ratio}"
                increase = over_seeds([c[plan]["increase"]["total"] for c in found])
                pairs = [
                    c[plan]["increase"]["total"] - c[other]["increase"]["total"] for c in found
                ]
                same = criterion == "ean"
                rows.append(
                    [
                        model,
                        f"{ratio:.0%}",
                        criterion,
                        shown(increase),
                        f"{agreement(found, plan):.2f}",
                        "" if same else between(over_seeds(pairs)),
                        "" if same else between(over_seeds(by_part(found, plan, other))),
                    ]
                )
    head = ["model", "dropped", "criterion", "loss increase", "overlap", "less `ean`", "text"]
    return lines + table(head, rows)


@themed
def figure(theme: Theme, data: Data) -> Figure:
    """A dot per seed: what a plan costs."""
    names = models(data)
    drawn = Figure(figsize=(8, 3.2), layout="constrained")
    panels = drawn.subplots(1, len(names), squeeze=False)[0]
    for axes, model in zip(panels, names, strict=True):
        for place, ratio in enumerate(RATIOS):
            for number, criterion in enumerate(MAIN):
                values = [
                    c[f"{criterion}@{ratio}"]["increase"]["total"] for c in cells(data, model)
                ]
                x = place + 0.22 * (number - 1)
                axes.plot(
                    [x] * len(values),
                    values,
                    MARKERS[number],
                    color=theme.series[number],
                    alpha=0.6,
                    label=criterion if place == 0 else None,
                )
        axes.set_xticks(range(len(RATIOS)), [f"{ratio:.0%} dropped" for ratio in RATIOS])
        axes.set_title(model)
        axes.set_ylabel("loss increase, nats per token")
        axes.set_ylim(bottom=0)
        axes.legend()
    return drawn
