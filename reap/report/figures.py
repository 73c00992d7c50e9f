"""Numbers -> figures, one function each, for the page and for files; `reap.report.style` has their
looks. Each takes the theme first; lists have an entry per layer, labels are `wording.plain`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator
from torch import Tensor

from reap.report.drawing import (
    LETTER,
    bottom_of,
    boxes,
    coloured,
    entry,
    name_columns,
    name_rows,
    plain_numbers,
    rgba,
    scale_bar,
)
from reap.report.style import (
    DIVERGING,
    MARK,
    MARKERS,
    ON_DARK,
    ON_LIGHT,
    SCALE,
    WIDTH,
    Theme,
    canvas,
    themed,
)
from reap.report.wording import number

OCTAVES = 2.0  # of a score above and below its layer's median that have a colour of their own
_ROWS = 4  # of pixels per layer, of which the last is the mark


@themed
def heatmap(
    theme: Theme,
    labels: Sequence[str],
    scores: Sequence[Tensor],  # [E] fp64 each
    dropped: Sequence[Collection[int]],
) -> Figure:
    """Layers x experts: each score against the median of its layer; the dropped ones underlined, no
    colour where no token went."""
    L, E = len(scores), max(map(len, scores))
    row = _ROWS * min(10, max(3, round(158 / L))) / 96  # in whole pixels of a screen
    left = 0.35 + LETTER * max(map(len, labels))
    figure, axes = canvas(WIDTH, L * row + 1.05, left=left, top=0.4, bottom=0.65)
    relative = np.full((L, E), np.nan)
    for at, score in enumerate(scores):
        relative[at, : len(score)] = octaves(score)
    colours = coloured(relative, SCALE, -OCTAVES, OCTAVES)
    pixels = np.repeat(colours, _ROWS, axis=0)
    for at, gone in enumerate(dropped):
        pixels[at * _ROWS + _ROWS - 1, list(gone)] = rgba(MARK)
    axes.imshow(pixels, aspect="auto", interpolation="none", extent=(-0.5, E - 0.5, L - 0.5, -0.5))
    name_rows(axes, labels, row)
    axes.set_xlabel("expert")
    if E <= 24 and row >= 0.3:
        for at, score in enumerate(scores):
            for expert, value in enumerate(score.tolist()):
                dark = math.isfinite(relative[at, expert]) and relative[at, expert] < 0.5
                axes.text(
                    expert,
                    at - 0.06,
                    number(value, 2),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=ON_DARK if dark else ON_LIGHT if value else theme.ink,
                )
    scale_bar(figure, SCALE, "score / median of its layer", [2.0**k for k in range(-2, 3)])
    figure.legend(
        handles=[Patch(facecolor=MARK, label="dropped: underlined")],
        loc="upper left",
        bbox_to_anchor=(left / WIDTH, 1),
        borderaxespad=0.1,
        handlelength=1.5,
        handleheight=0.3,
    )
    return figure


@themed
def spread(
    theme: Theme,
    labels: Sequence[str],
    values: Sequence[Tensor],  # [E] fp64 each
    dropped: Sequence[Collection[int]],
    what: str,
    bound: float | None = None,
) -> Figure:
    """How values spread over a layer's experts, those of the dropped and the kept in two colours;
    zeros are left out where the axis is logarithmic. `bound` is a line across."""
    L = len(values)
    figure, axes = canvas(WIDTH, 3.4, right=0.5, top=0.4, bottom=0.3 + bottom_of(labels))
    some = [value for each in values for value in each.tolist() if value > 0]
    if some and max(some) > 20 * min(some):
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    points = max(map(len, values)) <= 32
    for side, (colour, at) in enumerate(((theme.series[1], -0.17), (theme.series[0], 0.17))):
        parts = []
        for layer, gone in enumerate(dropped):
            found = values[layer].tolist()
            mine = [v for e, v in enumerate(found) if (e in gone) is (side == 0)]
            parts.append(np.array([v for v in mine if v > 0 or axes.get_yscale() == "linear"]))
        boxes(axes, parts, np.arange(L) + at, colour, points, MARKERS[side])
    if bound is not None:
        axes.axhline(bound, color=theme.ink, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.text(L - 0.25, bound, number(bound), ha="left", va="center", fontsize=8)
    axes.set_ylabel(what)
    axes.set_xlim(-0.7, L - 0.3)
    axes.grid(axis="y")
    plain_numbers(axes.yaxis)
    name_columns(axes, labels)
    figure.legend(
        handles=[
            Line2D([], [], color=colour, marker=MARKERS[side], markersize=4, label=label)
            for side, (colour, label) in enumerate(
                ((theme.series[1], "dropped"), (theme.series[0], "kept"))
            )
        ],
        loc="upper right",
        ncols=2,
        borderaxespad=0.1,
    )
    return figure


@themed
def certainty(
    theme: Theme,
    labels: Sequence[str],
    gaps: Mapping[str, Sequence[float]],  # by plan
    sure: float,
) -> Figure:
    """Per layer, the standard errors between the weakest kept and the strongest dropped."""
    L = len(labels)
    figure, axes = canvas(WIDTH, 2.9, top=0.4, bottom=0.3 + bottom_of(labels))
    known = [v for each in gaps.values() for v in each if math.isfinite(v)]
    top = max([10 * sure, *known]) * 1.5
    axes.set_yscale("symlog", linthresh=sure, linscale=0.6)
    axes.axhspan(-sure, sure, color=theme.grid, alpha=0.5, linewidth=0)
    axes.axhline(0, color=theme.muted, linewidth=0.6)
    for at, (name, widths) in enumerate(gaps.items()):
        drawn = [min(max(v, -top), top) for v in widths]  # infinity at the edge
        shift = (at - (len(gaps) - 1) / 2) * min(0.12, 0.6 / len(gaps))
        axes.plot(
            np.arange(L) + shift,
            drawn,
            linestyle="none",
            marker=MARKERS[at % len(MARKERS)],
            markersize=5,
            color=theme.series[at % len(theme.series)],
            label=entry(name),
        )
    axes.set_ylabel("gap at the cut, standard errors")
    low = min([-sure, *known, *(-top for each in gaps.values() if -math.inf in each)]) * 1.5
    axes.set_xlim(-0.7, L - 0.3)
    axes.grid(axis="y")
    decades = [10.0**k for k in range(1, 1 + max(1, math.ceil(math.log10(top))))]
    axes.set_yticks([*(-v for v in decades[::-1]), -sure, 0, sure, *decades])
    axes.set_ylim(low, top * 1.2)
    plain_numbers(axes.yaxis)
    name_columns(axes, labels)
    figure.legend(loc="upper right", ncols=min(4, len(gaps)), borderaxespad=0.1)
    return figure


@themed
def coselection(
    theme: Theme,
    labels: Sequence[str],
    lifts: Sequence[Tensor],  # [E,E] fp64 each, experts from the lowest score up
    dropped: Sequence[int],  # how many of them go
) -> Figure:
    """Experts x experts of some layers: how often tokens chose both, against how often each is
    chosen. Lines at the cut."""
    L = len(lifts)
    side = min(3.6, (WIDTH - 0.2 - 0.55 * L) / L)
    figure = Figure(figsize=(WIDTH, side + 1.15))
    width, height = figure.get_size_inches()
    for at, (label, lift, gone) in enumerate(zip(labels, lifts, dropped, strict=True)):
        E = len(lift)
        left = 0.5 + at * (side + 0.55)
        axes = figure.add_axes((left / width, 0.45 / height, side / width, side / height))
        octave = np.log2(np.where(lift.numpy() > 0, lift.numpy(), np.nan))
        pixels = coloured(octave, DIVERGING, -3, 3, colours=24)
        axes.imshow(
            pixels, aspect="auto", interpolation="none", extent=(-0.5, E - 0.5, E - 0.5, -0.5)
        )
        axes.axhline(gone - 0.5, color=MARK, linewidth=1.2)
        axes.axvline(gone - 0.5, color=MARK, linewidth=1.2)
        axes.set_title(f"layer {label}")
        axes.set_xlabel("experts: dropped, then kept")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    ticks = [2.0**k for k in range(-3, 4)]
    scale_bar(figure, DIVERGING, "chosen together / by proportion", ticks)
    return figure


def octaves(score: Tensor) -> np.ndarray:
    """log2 of each score [E] over the median of those above zero; NaN where it is not above."""
    values = score.numpy()
    above = values > 0
    found = np.full(len(values), np.nan)
    if above.any():
        found[above] = np.log2(values[above] / np.median(values[above]))
    return found
