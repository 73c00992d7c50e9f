"""Compression: from an eighth of the experts to three quarters, by every criterion."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from experiments.measures import Interval
from experiments.reading import (
    PAPER,
    Data,
    at,
    between,
    cells,
    claim,
    interval,
    models,
    shown,
    table,
)
from experiments.setting import RANKED, Setting
from experiments.subject import Subject
from reap.report.style import MARKERS, Theme, themed

SHOWN = ("reap", "ean", "frequency", "random")


def keys(setting: Setting) -> list[str]:
    return [str(seed) for seed in range(setting.seeds)]


def cell(subject: Subject, key: str) -> Any:
    """What every plan costs per domain, "criterion@ratio". The random plans' seed is the key."""
    stats = subject.mix(int(key))
    plans = {
        f"{criterion}@{ratio}": subject.plan(stats, criterion, ratio, seed=int(key))
        for criterion in (*RANKED, "random")
        for ratio in subject.setting.ratios
    }
    return subject.measured(plans)


def loss(found: list[Any], plan: str) -> Interval:
    return at(found, plan, "total", "loss")


def less(found: list[Any], first: str, second: str) -> Interval:
    """The first plan's increase less the second's, paired by seed."""
    return interval(found, lambda c: c[first]["total"]["loss"] - c[second]["total"]["loss"])


def report(data: Data) -> list[str]:
    ratios = data["setting"]["ratios"]
    lines = [
        "Loss increase in nats per token over the four domains, mean over the seeds and half of",
        "its 95% interval.",
        "",
    ]
    for model in models(data):
        found = cells(data, model)
        rows = [
            [criterion, *(shown(loss(found, f"{criterion}@{ratio}")) for ratio in ratios)]
            for criterion in (*RANKED, "random")
        ]
        lines += [f"**{model}**", ""]
        lines += table(["criterion", *(f"{ratio:.1%}" for ratio in ratios)], rows)
    lines += ["REAP's increase less another's, paired by seed; below zero REAP loses less:", ""]
    rows = []
    for model in models(data):
        found = cells(data, model)
        for other in (*RANKED[1:], "random"):
            pairs = [less(found, f"reap@{ratio}", f"{other}@{ratio}") for ratio in ratios]
            rows.append([model, other, *(between(pair) for pair in pairs)])
    return lines + table(["model", "against", *(f"{ratio:.1%}" for ratio in ratios)], rows)


def claims(data: Data) -> list[list[str]]:
    rows = []
    for ratio in data["setting"]["ratios"]:
        for other in ("frequency", "ean"):
            for model in models(data):
                pair = less(cells(data, model), f"reap@{ratio}", f"{other}@{ratio}")
                text = f"REAP loses less than {other} at {ratio:.1%}"
                rows.append(claim(text, PAPER, model, pair))
    return rows


@themed
def figure(theme: Theme, data: Data) -> Figure:
    """Loss increase over the share dropped, with intervals."""
    names, ratios = models(data), data["setting"]["ratios"]
    drawn = Figure(figsize=(8, 3.4), layout="constrained")
    panels = drawn.subplots(1, len(names), squeeze=False)[0]
    for axes, model in zip(panels, names, strict=True):
        found = cells(data, model)
        for number, criterion in enumerate(SHOWN):
            values = [loss(found, f"{criterion}@{ratio}") for ratio in ratios]
            colour = theme.muted if criterion == "random" else theme.series[number]
            axes.plot(
                [100 * ratio for ratio in ratios],
                [value.middle for value in values],
                f"-{MARKERS[number]}",
                color=colour,
                label=criterion,
            )
            axes.fill_between(
                [100 * ratio for ratio in ratios],
                [value.low for value in values],
                [value.high for value in values],
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
        axes.set_title(model)
        axes.set_xlabel("experts dropped, %")
        axes.set_ylabel("loss increase, nats per token")
        axes.set_ylim(bottom=0)
        axes.legend()
    return drawn
