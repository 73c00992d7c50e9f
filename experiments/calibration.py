"""How many tokens it takes until the ranking settles, and what a plan of fewer costs."""

from __future__ import annotations

from math import nan
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from experiments import rows
from experiments.measures import Interval, kendall, over_seeds, overlap
from experiments.reading import Data, at, cells, models, shown, table
from experiments.setting import MAIN, Setting
from experiments.subject import Subject
from experiments.texts import DOMAINS
from reap.planning.criteria import saliency
from reap.report.style import MARKERS, Theme, themed
from reap.runs.calibration import calibrate
from reap.statistics.stats import Statistics

RATIO = 0.5
NEAR = 0.9  # of the rank correlation, and of the experts kept


def keys(setting: Setting) -> list[str]:
    return [str(seed) for seed in range(max(2, setting.seeds))]  # each is held against others


def cell(subject: Subject, key: str) -> Any:
    """After every size of the sample the scores [L][E] of each criterion, of which the figures
    need ranks alone, and the loss increase of REAP's plan."""
    sizes = subject.setting.settling
    plans, scores = {}, {}
    for size, stats in zip(sizes, growing(subject, int(key)), strict=True):
        scores[str(size)] = {
            criterion: [[float(f"{v:.4g}") for v in s] for s in saliency(stats, criterion).values()]
            for criterion in MAIN
        }
        plans[str(size)] = subject.plan(stats, "reap", RATIO)
    increases = subject.measured(plans)
    return {"scores": scores, "increase": {s: v["total"]["loss"] for s, v in increases.items()}}


def growing(subject: Subject, seed: int) -> list[Statistics]:
    """Statistics of the first tokens of one sample, for every size."""
    length, sizes = subject.setting.seq_len, subject.setting.settling
    tokenizer = subject.tokenizer
    given = {d: rows.training(tokenizer, d, seed, max(sizes), length) for d in DOMAINS}
    found: list[Statistics] = []
    done = 0
    for size in sizes:
        batches = [
            {"input_ids": part, "domain": domain}
            for domain, ids in given.items()
            for part in ids[done : size // length].split(16)
        ]
        stats = calibrate(subject.model, batches)
        found.append(found[-1] + stats if found else stats)
        done = size // length
    return found


def against_others(found: list[Any], criterion: str, size: str) -> tuple[Interval, Interval]:
    """Kendall's tau, and the overlap of the experts kept at RATIO, between the scores of a seed and
    the mean of the other seeds' largest samples; means over layers, intervals over seeds."""
    if len(found) < 2:  # of a run that is not done
        return Interval(nan, nan, nan), Interval(nan, nan, nan)
    taus, overlaps = [], []
    last = list(found[0]["scores"])[-1]
    for number, cell in enumerate(found):
        others = [c["scores"][last][criterion] for i, c in enumerate(found) if i != number]
        layers = [
            (ours, [mean(values) for values in zip(*theirs, strict=True)])
            for ours, *theirs in zip(cell["scores"][size][criterion], *others, strict=True)
        ]
        taus.append(mean(kendall(ours, theirs) for ours, theirs in layers))
        overlaps.append(mean(overlap(best(ours), best(theirs)) for ours, theirs in layers))
    return over_seeds(taus), over_seeds(overlaps)


def best(scores: list[float]) -> set[int]:
    order = sorted(range(len(scores)), key=lambda expert: -scores[expert])
    return set(order[: len(order) - int(len(order) * RATIO)])


def settled(found: list[Any], criterion: str, which: int) -> str:
    """The fewest tokens from which on a measure is within NEAR of what the most tokens give."""
    sizes = list(found[0]["scores"])
    values = [against_others(found, criterion, size)[which].middle for size in sizes]
    enough = sizes[-1]
    for size, value in zip(reversed(sizes), reversed(values), strict=True):
        if value < NEAR * values[-1]:
            break
        enough = size
    return f"{len(DOMAINS) * int(enough):,}"


def report(data: Data) -> list[str]:
    sizes = [str(size) for size in data["setting"]["settling"]]
    lines = [
        "The scores of a sample against the mean of the other seeds' largest ones: Kendall's tau,",
        f"and the overlap of the experts kept at {RATIO:.0%}. `settled`: the fewest tokens from",
        f"which on it has {NEAR:.0%} of the last column. Tokens are of all four domains together.",
        "",
    ]
    rows = []
    for model in models(data):
        found = cells(data, model)
        for criterion in MAIN:
            both = [against_others(found, criterion, size) for size in sizes]
            for which, what in enumerate(("tau", "overlap")):
                line = [shown(pair[which], 2, signed=False) for pair in both]
                rows.append([model, criterion, what, *line, settled(found, criterion, which)])
        increases = [at(found, "increase", size) for size in sizes]
        rows.append([model, "reap", "loss increase", *(shown(value) for value in increases), ""])
    head = ["model", "criterion", "", *(f"{len(DOMAINS) * int(s):,}" for s in sizes), "settled"]
    return lines + table(head, rows)


@themed
def figure(theme: Theme, data: Data) -> Figure:
    """Rank correlation, and what REAP's plan costs, over the tokens of the sample."""
    names = models(data)
    sizes = [str(size) for size in data["setting"]["settling"]]
    tokens = [len(DOMAINS) * int(size) for size in sizes]
    drawn = Figure(figsize=(8, 5), layout="constrained")
    panels = drawn.subplots(2, len(names), squeeze=False, sharex=True)
    for (top, bottom), model in zip(panels.T, names, strict=True):
        found = cells(data, model)
        for number, criterion in enumerate(MAIN):
            values = [against_others(found, criterion, size)[0] for size in sizes]
            colour = theme.series[number]
            middles = [value.middle for value in values]
            top.plot(tokens, middles, f"-{MARKERS[number]}", color=colour, label=criterion)
            low, high = ([value[end] for value in values] for end in (1, 2))
            top.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0)
        for cell in found:
            increases = [cell["increase"][size] for size in sizes]
            bottom.plot(tokens, increases, f"-{MARKERS[0]}", color=theme.series[0], alpha=0.6)
        top.set_title(model)
        top.set_ylabel("Kendall's tau")
        top.legend()
        bottom.set_xscale("log", base=2)
        bottom.set_ylim(bottom=0)
        bottom.set_ylabel(f"reap at {RATIO:.0%}: loss increase")
        bottom.set_xlabel("calibration tokens")
    return drawn
