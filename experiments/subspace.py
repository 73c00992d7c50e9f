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
from experiments.reading import PAPER, Data, cells, claim, models, shown, table
from experiments.setting import Setting
from experiments.subject import Subject
from experiments.texts import DOMAINS
from reap.merging.mergeplan import Merge
from reap.report.style import MARKERS, Theme, themed
from reap.runs.calibration import calibrate
from reap.statistics.stats import Statistics

Means = list[tuple[Tensor, Tensor]]  # per layer

RATIO = 0.5
KINDS = {"spread": "every expert once", "weighted": "by its tokens"}
DRAWN = ("reap", "hc-smoe")
CELL_SEED = "0"  # whose points are drawn


def keys(setting: Setting) -> list[str]:
    return [str(seed) for seed in range(setting.seeds)]


def cell(subject: Subject, key: str) -> Any:
    """Per variant and layer the spread of mean outputs in units of the original's, and for DRAWN
    the points [N][2] on the original's first two components."""
    seed = int(key)
    before = means(subject.mix(seed))
    axes = [components(points) for points, _ in before]
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
        pairs = list(zip(after, before, strict=True))
        found[method] = {
            "spread": [spread(a) / spread(b) for (a, _), (b, _) in pairs],
            "weighted": [spread(*a) / spread(*b) for a, b in pairs],
        }
        if method in DRAWN:
            found[method]["points"] = projected(after, before, axes)
    return found


def means(stats: Statistics, merge: Merge | None = None) -> Means:
    """Per layer the mean output [N,H] fp64 of every expert that was picked, those of a group as
    one, and its tokens [N]."""
    found = []
    for name in stats.layers:
        layer = stats.layer(name)
        sums, counts = layer.output_sum, layer.count
        assert sums is not None
        if merge is not None:
            groups = [list(group.experts) for group in merge.groups[name]]
            sums = torch.stack([sums[ids].sum(0) for ids in groups])
            counts = torch.stack([counts[ids].sum() for ids in groups])
        sums, counts = sums[counts > 0], counts[counts > 0]
        found.append((sums / counts[:, None], counts))
    return found


def components(points: Tensor) -> tuple[Tensor, float]:
    """The first two principal directions [2,H], and their share of the variance."""
    _, sizes, directions = torch.linalg.svd(points - points.mean(0), full_matrices=False)
    variances = sizes**2
    return directions[:2], float(variances[:2].sum() / variances.sum())


def projected(
    points: Means, origin: Means, axes: list[tuple[Tensor, float]]
) -> list[list[list[float]]]:
    return [
        ((p - o.mean(0)) @ directions.T).tolist()
        for (p, _), (o, _), (directions, _) in zip(points, origin, axes, strict=True)
    ]


def layers(found: list[Any], method: str, kind: str = "spread") -> list[Interval]:
    by_layer = zip(*(c[method][kind] for c in found), strict=True)
    return [over_seeds(values) for values in by_layer]


def whole(found: list[Any], method: str, kind: str) -> Interval:
    return over_seeds([mean(c[method][kind]) for c in found])


def report(data: Data) -> list[str]:
    lines = [
        f"Variance of the experts' mean outputs, over the original model's, {RATIO:.0%} dropped or",
        "merged; one is a spread that was kept. Experts that were merged are one. Either every",
        "expert counts once, or each by its tokens. Layers from the first to the last.",
        "",
    ]
    rows = []
    for model in models(data):
        found = cells(data, model)
        for kind, told in KINDS.items():
            for method in METHODS:
                each = [f"{value.middle:.2f}" for value in layers(found, method, kind)]
                mean_of_all = shown(whole(found, method, kind), 2, signed=False)
                rows.append([model, told, method, mean_of_all, *each])
    depth = len(layers(cells(data, models(data)[0]), METHODS[0]))
    return lines + table(["model", "", "method", "mean", *map(str, range(1, depth + 1))], rows)


def claims(data: Data) -> list[list[str]]:
    rows = []
    for model in models(data):
        found = cells(data, model)
        for kind, told in KINDS.items():
            for other in MERGED:
                pair = over_seeds([mean(c[other][kind]) - mean(c["reap"][kind]) for c in found])
                text = f"spread, {told}: {other} keeps less than REAP at {RATIO:.0%}"
                rows.append(claim(text, PAPER, model, pair))
                late = over_seeds([halves(c[other][kind]) for c in found])
                text = f"spread, {told}: by {other} later layers keep less than earlier ones"
                rows.append(claim(text, PAPER, model, late))
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
            for kind, line in (("spread", "-"), ("weighted", ":")):
                values = [value.middle for value in layers(found, method, kind)]
                by_layer.plot(
                    range(1, len(values) + 1),
                    values,
                    f"{line}{MARKERS[number]}",
                    color=theme.series[number],
                    label=method if kind == "spread" else None,
                )
        by_layer.axhline(1, color=theme.muted, linewidth=0.8)
        by_layer.set_xlabel("layer")
        by_layer.set_ylabel("spread kept (dotted: by tokens)")
        by_layer.set_ylim(bottom=0)
    lines = panels[0, 2].get_lines()[: 2 * len(METHODS) : 2]
    drawn.legend(lines, METHODS, loc="outside upper center", ncols=len(METHODS))
    return drawn
