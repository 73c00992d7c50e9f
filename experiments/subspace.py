"""The functional subspace: mean expert outputs before and after, pruned against merged."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments.measures import Interval, over_seeds, spread
from experiments.merging import MERGED, METHODS, variants
from experiments.reading import Data, between, cells, models, shown, table, verdict
from experiments.setting import Setting
from experiments.subject import Subject
from experiments.texts import DOMAINS
from reap.merging.mergeplan import Merge
from reap.report.style import MARKERS, Theme, themed
from reap.runs.calibration import calibrate
from reap.statistics.stats import Statistics

RATIO = 0.5
DRAWN = ("reap", "hc-smoe")
CELL_SEED = "0"  # whose points are drawn


def keys(setting: Setting) -> list[str]:
    return [str(seed) for seed in range(setting.seeds)]


def cell(subject: Subject, key: str) -> Any:
    """Per variant and layer the spread of mean outputs in units of the original's, and for DRAWN
    the points [N][2] on the original's first two components."""
    seed = int(key)
    before = means(subject.mix(seed, outputs=True))
    axes = [components(points) for points in before]
    found: dict[str, Any] = {
        "original": {"points": projected(before, before, axes)},
        "explained": [share for _, share in axes],
    }
    for name, (changed, how) in variants(subject, seed).items():
        if not name.endswith(f"@{RATIO}"):
            continue
        with changed():
            stats = Statistics.total(
                calibrate(subject.model, subject.text(domain, seed), outputs=True)
                for domain in DOMAINS
            )
        after = means(stats, how if isinstance(how, Merge) else None)
        method = name.partition("@")[0]
        shares = [spread(a) / spread(b) for a, b in zip(after, before, strict=True)]
        found[method] = {"spread": shares}
        if method in DRAWN:
            found[method]["points"] = projected(after, before, axes)
    return found


def means(stats: Statistics, merge: Merge | None = None) -> list[Tensor]:
    """Per layer the mean output of every expert that was picked, those of a group as one: [N,H]
    fp64."""
    found = []
    for name in stats.layers:
        layer = stats.layer(name)
        sums, counts = layer.output_sum, layer.count
        assert sums is not None
        if merge is not None:
            groups = [list(group.experts) for group in merge.groups[name]]
            sums = torch.stack([sums[ids].sum(0) for ids in groups])
            counts = torch.stack([counts[ids].sum() for ids in groups])
        found.append(sums[counts > 0] / counts[counts > 0][:, None])
    return found


def components(points: Tensor) -> tuple[Tensor, float]:
    """The first two principal directions [2,H], and their share of the variance."""
    _, sizes, directions = torch.linalg.svd(points - points.mean(0), full_matrices=False)
    variances = sizes**2
    return directions[:2], float(variances[:2].sum() / variances.sum())


def projected(
    points: list[Tensor], origin: list[Tensor], axes: list[tuple[Tensor, float]]
) -> list[list[list[float]]]:
    return [
        ((p - o.mean(0)) @ directions.T).tolist()
        for p, o, (directions, _) in zip(points, origin, axes, strict=True)
    ]


def layers(found: list[Any], method: str) -> list[Interval]:
    return [
        over_seeds(values) for values in zip(*(c[method]["spread"] for c in found), strict=True)
    ]


def whole(found: list[Any], method: str) -> Interval:
    return over_seeds([mean(c[method]["spread"]) for c in found])


def report(data: Data) -> list[str]:
    lines = [
        f"Variance of the experts' mean outputs, over the original model's, {RATIO:.0%} dropped or",
        "merged; one is a spread that was kept. Layers from the first to the last.",
        "",
    ]
    rows = []
    for model in models(data):
        found = cells(data, model)
        for method in METHODS:
            each = [f"{value.middle:.2f}" for value in layers(found, method)]
            rows.append([model, method, shown(whole(found, method), 2, signed=False), *each])
    depth = len(layers(cells(data, models(data)[0]), METHODS[0]))
    return lines + table(["model", "method", "mean", *map(str, range(1, depth + 1))], rows)


def claims(data: Data) -> list[list[str]]:
    rows = []
    for model in models(data):
        found = cells(data, model)
        for other in MERGED:
            values = [mean(c[other]["spread"]) - mean(c["reap"]["spread"]) for c in found]
            pair = over_seeds(values)
            claim = f"spread: {other} keeps less than REAP at {RATIO:.0%}"
            rows.append([claim, model, between(pair), verdict(pair)])
            late = over_seeds([halves(c[other]["spread"]) for c in found])
            claim = f"spread by {other}: later layers keep less than earlier ones"
            rows.append([claim, model, between(late), verdict(late)])
    return rows


def halves(values: Sequence[float]) -> float:
    """The mean of the later half less that of the earlier."""
    middle = len(values) // 2
    return mean(values[-middle:]) - mean(values[:middle])


@themed
def figure(theme: Theme, data: Data) -> Figure:
    """Mean outputs on the original's first two components, first and last layer; the spread kept
    by layer."""
    names = models(data)
    drawn = Figure(figsize=(8, 2.6 * len(names)), layout="constrained")
    panels = drawn.subplots(len(names), 3, squeeze=False)
    for (first, last, by_layer), model in zip(panels, names, strict=True):
        found = cells(data, model)
        one = found[int(CELL_SEED)]
        for axes, layer in ((first, 0), (last, -1)):
            for method, colour, marker in (
                ("original", theme.muted, "."),
                *((m, theme.series[METHODS.index(m)], MARKERS[METHODS.index(m)]) for m in DRAWN),
            ):
                x, y = zip(*one[method]["points"][layer], strict=True)
                axes.plot(x, y, marker, color=colour, alpha=0.7, label=method)
            axes.set_title(f"{model}, {'first' if layer == 0 else 'last'} layer")
            axes.set_xlabel("component 1")
            axes.set_ylabel("component 2")
        first.legend()
        for number, method in enumerate(METHODS):
            values = [value.middle for value in layers(found, method)]
            by_layer.plot(
                range(1, len(values) + 1),
                values,
                f"-{MARKERS[number]}",
                color=theme.series[number],
                label=method,
            )
        by_layer.axhline(1, color=theme.muted, linewidth=0.8)
        by_layer.set_xlabel("layer")
        by_layer.set_ylabel("spread kept")
        by_layer.set_ylim(bottom=0)
        by_layer.legend()
    return drawn
