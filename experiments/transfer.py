"""Calibrated on one kind of text, measured on another: matched, mismatched and mixed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from experiments.measures import Interval, over_seeds
from experiments.reading import OURS, PAPER, Data, cells, claim, models, shown, table
from experiments.setting import MAIN, Setting
from experiments.subject import Subject
from experiments.texts import DOMAINS
from reap.report.style import ON_DARK, ON_LIGHT, Theme, themed

RATIO = 0.5
MIXED = "mixed"


def keys(setting: Setting) -> list[str]:
    return [str(seed) for seed in range(setting.seeds)]


def calibrations() -> dict[str, tuple[str, ...]]:
    """What is calibrated on, by name: each domain, all, and all but one."""
    without = {other(d): tuple(e for e in DOMAINS if e != d) for d in DOMAINS}
    return {d: (d,) for d in DOMAINS} | {MIXED: DOMAINS} | without


def other(domain: str) -> str:
    return f"all but {domain}"


def cell(subject: Subject, key: str) -> Any:
    """{"criterion/calibrated on": {measured on: loss increase}}, at RATIO."""
    plans = {
        f"{criterion}/{name}": subject.plan(subject.mix(int(key), domains), criterion, RATIO)
        for name, domains in calibrations().items()
        for criterion in MAIN
    }
    losses = subject.measured(plans)
    return {name: {d: v["loss"] for d, v in by.items()} for name, by in losses.items()}


def average(found: list[Any], criterion: str, kind: str) -> list[float]:
    """Per seed, the increase on a domain, mean over domains, when the text was of that domain
    ("matched"), of the three others ("mismatched") or of all ("mixed")."""
    source = {
        "matched": {d: d for d in DOMAINS},
        "mismatched": {d: other(d) for d in DOMAINS},
        "mixed": dict.fromkeys(DOMAINS, MIXED),
    }[kind]
    return [mean(c[f"{criterion}/{source[d]}"][d] for d in DOMAINS) for c in found]


KINDS = ("matched", "mixed", "mismatched")


def difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    return over_seeds([a - b for a, b in zip(first, second, strict=True)])


def report(data: Data) -> list[str]:
    lines = [
        f"{RATIO:.0%} dropped. Loss increase on a domain, mean over the domains, by what the",
        "calibration text was: that domain (matched), all four (mixed), the three others",
        "(mismatched).",
        "",
    ]
    rows = []
    for model in models(data):
        found = cells(data, model)
        for criterion in MAIN:
            means = [over_seeds(average(found, criterion, kind)) for kind in KINDS]
            rows.append([model, criterion, *(shown(value) for value in means)])
    lines += table(["model", "criterion", *KINDS], rows)
    lines += ["REAP, calibrated on (rows) and measured on (columns), mean over seeds:", ""]
    for model in models(data):
        found = cells(data, model)
        rows = [[n, *(f"{v:+.3f}" for v in matrix(found, n))] for n in (*DOMAINS, MIXED)]
        lines += table([f"**{model}**", *DOMAINS], rows)
    return lines


def matrix(found: list[Any], calibrated: str) -> list[float]:
    return [mean(c[f"reap/{calibrated}"][domain] for c in found) for domain in DOMAINS]


def claims(data: Data) -> list[list[str]]:
    rows = []
    for model in models(data):
        found = cells(data, model)
        for better, worse in (("matched", "mismatched"), ("mixed", "mismatched")):
            pair = difference(average(found, "reap", better), average(found, "reap", worse))
            text = f"REAP at {RATIO:.0%} loses less by {better} text than by {worse} text"
            rows.append(claim(text, PAPER, model, pair))
        for kind, criterion in product(("matched", "mismatched"), MAIN[1:]):
            pair = difference(*(average(found, c, kind) for c in ("reap", criterion)))
            text = f"by {kind} text REAP loses less than {criterion} at {RATIO:.0%}"
            rows.append(claim(text, OURS, model, pair))
    return rows


@themed
def figure(theme: Theme, data: Data) -> Figure:
    """REAP's loss increase by the text that calibrated it and the text that is measured."""
    names = models(data)
    drawn = Figure(figsize=(8, 3.6), layout="constrained")
    panels = drawn.subplots(1, len(names), squeeze=False)[0]
    lines = (*DOMAINS, MIXED)
    for axes, model in zip(panels, names, strict=True):
        values = [matrix(cells(data, model), name) for name in lines]
        image = axes.imshow(values, aspect="auto")
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                dark = image.norm(value) < 0.5
                colour = ON_DARK if dark else ON_LIGHT
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour)
        axes.set_xticks(range(len(DOMAINS)), DOMAINS)
        axes.set_yticks(range(len(lines)), lines)
        axes.set_xlabel("measured on")
        axes.set_ylabel("calibrated on")
        axes.set_title(f"{model}: loss increase, reap at {RATIO:.0%}")
    return drawn
