"""What several figures are made of: images, tinted tables, boxes, names beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from reap.report.style import LIGHT, ON_DARK, WIDTH
from reap.report.wording import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 24  # names below, each of which takes its time
LETTER = 0.082  # inches, of a label's


def coloured(
    table: np.ndarray, scale: str, low: float, high: float, *, colours: int = 256
) -> np.ndarray:
    """[rows, columns, 4] uint8 of numbers [rows, columns] from `low` to `high`; transparent where
    there is none."""
    ramp = matplotlib.colormaps[scale].resampled(colours)
    pixels = ramp(Normalize(low, high, clip=True)(table), bytes=True)
    pixels[np.isnan(table)] = 0
    return pixels


def entry(name: str) -> str:
    """A name for a legend, from which matplotlib leaves out what is empty or begins with "_"."""
    return name if name[:1] not in ("", "_") else f" {name}"


def rgba(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)] + [255]


def tints(table: np.ndarray) -> np.ndarray:
    """[rows, columns, 4] uint8 of numbers from -1 to 1, which paper of either theme shines through
    the more, the nearer to 0; nothing where there is no number."""
    pixels = np.zeros((*table.shape, 4), dtype=np.uint8)
    pixels[table >= 0] = rgba(LIGHT.series[0])
    pixels[table < 0] = rgba(LIGHT.series[1])
    pixels[..., 3] = np.nan_to_num(np.abs(table)).clip(0, 1) * 140
    return pixels


def tinted(axes: Axes, table: Tensor, form: str) -> None:
    """Cells [N,M] in `tints`, with their numbers where there is a form for them."""
    N, M = table.shape
    extent = (-0.5, M - 0.5, N - 0.5, -0.5)
    axes.imshow(tints(table.numpy()), aspect="auto", interpolation="none", extent=extent)
    for i, row in enumerate(table.tolist() if form else ()):
        for j, value in enumerate(row):
            if not math.isnan(value):
                shown = form.format(value).replace("-0.00", "0.00").replace("-", "\N{MINUS SIGN}")
                axes.text(j, i, shown, ha="center", va="center", fontsize=8)


def boxes(
    axes: Axes,
    parts: Sequence[np.ndarray],
    at: np.ndarray,
    colour: str,
    points: bool,
    marker: str,
) -> None:
    """Of each part its range as a line, its quartiles as a box, its median as a gap in it; or, with
    `points`, the range and all values."""
    whole = [(x, part) for x, part in zip(at, parts, strict=True) if len(part)]
    axes.add_collection(
        LineCollection(
            [[(x, part.min()), (x, part.max())] for x, part in whole],
            colors=colour,
            linewidths=0.8 if not points else 0.5,
        )
    )
    if points:
        axes.plot(
            [x for x, part in whole for _ in part],
            [value for _, part in whole for value in part],
            linestyle="none",
            marker=marker,
            markersize=3.5,
            color=colour,
            alpha=0.8,
        )
    else:
        half = 0.13
        quartiles = [(x, *np.quantile(part, (0.25, 0.5, 0.75))) for x, part in whole]
        outlines = [
            [(x - half, low), (x + half, low), (x + half, high), (x - half, high)]
            for x, low, _, high in quartiles
        ]
        axes.add_collection(PolyCollection(outlines, facecolors=colour, edgecolors="none"))
        medians = [[(x - half, mid), (x + half, mid)] for x, _, mid, _ in quartiles]
        axes.add_collection(LineCollection(medians, colors=ON_DARK, linewidths=1.2))
    axes.autoscale_view()


def name_rows(axes: Axes, names: Sequence[str], inches: float) -> None:
    """At the left of an image, as many as have room."""
    step = max(1, math.ceil(0.2 / inches))
    axes.set_yticks(range(0, len(names), step), list(names)[::step])
    axes.tick_params(left=False, labelsize=9 if inches * step >= 0.15 else 7.5)
    axes.spines[:].set_visible(False)


def name_columns(axes: Axes, names: Sequence[str], inches: float | None = None) -> None:
    """Below: upright where they are short, else turned; as many as have room."""
    room = inches or axes.get_position().width * WIDTH / max(1, len(names))
    turned = _turned(names, room)
    wide = 0.16 if turned else LETTER * max(map(len, names)) + 0.08
    step = max(1, math.ceil(wide / room), math.ceil(len(names) / MOST))
    axes.set_xticks(range(0, len(names), step), list(names)[::step])
    if turned:
        axes.tick_params(axis="x", rotation=90)
    if inches:
        axes.tick_params(bottom=False)


def _turned(names: Sequence[str], room: float) -> bool:
    longest = max(map(len, names))
    return longest > 3 and longest * LETTER > room


def bottom_of(names: Sequence[str], room: float | None = None) -> float:
    """Inches that the names below take."""
    room = room or (WIDTH - 1) / max(1, len(names))
    return 0.1 + LETTER * max(map(len, names)) if _turned(names, room) else 0.2


def scale_bar(figure: Figure, scale: str | None, label: str, ticks: Sequence[float]) -> None:
    """What the colours of an image mean, at the top right: of a scale in octaves, or without one
    the tints of shares."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((1 - 3.15 / width, 1 - 0.16 / height, 3.0 / width, 0.09 / height))
    if scale is None:
        places = list(ticks)
        ramp = tints(np.linspace(places[0], places[-1], 64)[None])
        names = [f"{tick:.0%}" for tick in ticks]
    else:
        places = [math.log2(tick) for tick in ticks]
        ramp = matplotlib.colormaps[scale](np.linspace(0, 1, 64), bytes=True)[None]
        names = [number(tick) if tick >= 1 else f"1/{number(1 / tick)}" for tick in ticks]
    extent = (places[0], places[-1], 0, 1)
    axes.imshow(ramp, aspect="auto", interpolation="none", extent=extent)
    axes.set(yticks=[], xticks=places, xticklabels=names)
    axes.tick_params(axis="x", length=0, pad=2, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.set_ylabel(label, rotation=0, ha="right", va="center", labelpad=6)


def plain_numbers(axis: Any) -> None:
    """Ticks as `wording.number` writes them."""
    axis.set_major_formatter(lambda value, _: number(value))
