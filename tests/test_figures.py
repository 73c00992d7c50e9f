"""What figures show, read from the figures themselves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from reap.report import comparisons, figures
from reap.report.drawing import coloured, rgba, tints
from reap.report.style import DARK, LIGHT, MARK, SCALE, svg_of

NAN = math.nan


def image(figure: Figure) -> np.ndarray:
    """The pixels of the first axes."""
    found = [one for one in figure.axes[0].get_children() if isinstance(one, AxesImage)]
    return np.asarray(found[0].get_array())


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def scores(*rows: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def test_heatmap_marks_what_is_dropped() -> None:
    rows = scores([1.0, 2.0, 4.0, 0.0], [8.0, 8.0, 8.0])
    figure = figures.heatmap(LIGHT, ["0", "1"], rows, [{0, 3}, set()])
    pixels = image(figure)
    L, E, high = 2, 4, figures._ROWS
    assert pixels.shape == (L * high, E, 4)
    marks = (pixels == rgba(MARK)).all(-1)
    assert marks.sum() == 2 and marks[high - 1, 0] and marks[high - 1, 3]
    # Against the median of those that have a score, 2.
    scale = coloured(np.array([[-1.0, 0.0, 1.0]]), SCALE, -figures.OCTAVES, figures.OCTAVES)[0]
    assert (pixels[0, :3] == scale).all()
    assert pixels[0, 3, 3] == 0 and (pixels[high:, 3] == 0).all()  # no token, and no such expert
    assert words(figure) == ["1", "2", "4", "0", "8", "8", "8"]


def test_octaves() -> None:
    found = figures.octaves(torch.tensor([0.0, 1.0, 2.0, 8.0], dtype=torch.float64))
    assert np.isnan(found[0]) and found[1:].tolist() == [-1, 0, 2]
    assert np.isnan(figures.octaves(torch.zeros(3, dtype=torch.float64))).all()


@pytest.mark.parametrize("L", [1, 4, 94])
@pytest.mark.parametrize("E", [2, 8, 512])
def test_every_size_is_drawn(L: int, E: int) -> None:
    rows = [torch.rand(E, dtype=torch.float64) + 0.1 for _ in range(L)]
    gone = [set(range(E // 2))] * L
    labels = [str(at) for at in range(L)]
    heat = figures.heatmap(LIGHT, labels, rows, gone)
    assert heat.get_size_inches()[1] < 0.13 * L + 3
    shown = [label.get_text() for label in heat.axes[0].get_yticklabels()]
    assert shown[0] == "0" and len(shown) <= max(4, 0.6 * L)
    spread = figures.spread(LIGHT, labels, rows, gone, "score", 0.5)
    names = spread.axes[0].get_xticklabels()
    assert names[0].get_text() == "0" and len(names) <= 24


def test_no_labels_touch() -> None:
    """Of the columns and rows, where names are long and many."""
    names = [f"a rather long name {at}" for at in range(40)]
    table = torch.rand(9, 40, dtype=torch.float64)
    figure = comparisons.by_layer(LIGHT, names, names[:9], table)
    svg_of(figure)  # draws it
    for labels in (figure.axes[0].get_xticklabels(), figure.axes[0].get_yticklabels()):
        boxes = [label.get_window_extent() for label in labels]
        for one, other in zip(boxes, boxes[1:], strict=False):
            assert not one.overlaps(other)


def test_spread_shows_every_value_of_few_and_quartiles_of_many() -> None:
    rows = scores([1.0, 2.0, 3.0, 4.0])
    few: Any = figures.spread(LIGHT, ["0"], rows, [{0, 1}], "score").axes[0]
    dropped, kept = (line.get_ydata().tolist() for line in few.lines)
    assert (dropped, kept) == ([1.0, 2.0], [3.0, 4.0]) and few.get_yscale() == "linear"
    many: Any = figures.spread(
        LIGHT, ["0"], [torch.arange(1.0, 101).double()], [set(range(50))], "n"
    )
    box = many.axes[0].collections[1].get_paths()[0].vertices[:, 1]
    assert (box.min(), box.max()) == (13.25, 37.75)
    assert many.axes[0].get_yscale() == "log"


def test_spread_of_nothing_but_zeros() -> None:
    svg_of(figures.spread(LIGHT, ["0"], scores([0.0, 0.0]), [{0}], "tokens", 100))
    svg_of(figures.spread(LIGHT, ["0"], scores([0.0, 1.0, 100.0]), [{0}], "tokens"))
    svg_of(figures.spread(LIGHT, ["0"], scores([1.0, 2.0]), [set()], "score"))


@pytest.mark.parametrize("wide", [True, False])
def test_certainty_shows_infinity_at_the_edge_and_no_nan(wide: bool) -> None:
    gaps = {"a": [1.0, NAN, math.inf], "b": [-50.0 if wide else 0.0, 3.0, -math.inf]}
    axes: Any = figures.certainty(DARK, ["0", "1", "2"], gaps, 2.0).axes[0]
    svg_of(axes.figure)
    points = [line for line in axes.lines if len(line.get_xdata()) == 3]
    low, high = axes.get_ylim()
    for line, widths in zip(points, gaps.values(), strict=True):
        for drawn, width in zip(line.get_ydata(), widths, strict=True):
            assert math.isnan(drawn) == math.isnan(width)
            assert math.isnan(drawn) or low <= drawn <= high


def test_tables_have_numbers_and_tints() -> None:
    table = torch.tensor([[1.0, -0.5], [NAN, 0.0]], dtype=torch.float64)
    figure = comparisons.agreement(LIGHT, ["a", "b"], table, table.abs())
    assert words(figure) == ["1.00", "\u22120.50", "0.00"]
    alpha = tints(table.numpy())[..., 3].tolist()
    assert alpha[0][0] > alpha[0][1] > 0 == alpha[1][0] == alpha[1][1]


def test_coselection_and_the_rest_are_drawn() -> None:
    lift = torch.tensor([[NAN, 2.0], [2.0, NAN]], dtype=torch.float64)
    for count in (1, 4):
        pairs = figures.coselection(LIGHT, ["0"] * count, [lift] * count, [1] * count)
        svg_of(pairs)
        assert len(pairs.axes) == count + 1
    texts = comparisons.composition(LIGHT, ["a", "b"], [300, 100], [0, 1], ["x", "y"])
    assert [text.strip() for text in words(texts)] == ["75%", "25%"]
    table = torch.tensor([[0.1, NAN], [0.2, -0.1]], dtype=torch.float64)
    cost = comparisons.costs(LIGHT, ["p", "q"], ["x", "total"], {"loss": table, "KL": table})
    svg_of(cost)
    points = [np.asarray(line.get_xdata()).tolist() for line in cost.axes[0].lines[:2]]
    assert points[0] == [0.1, 0.2] and math.isnan(points[1][0]) and points[1][1] == -0.1


@pytest.mark.filterwarnings("error")
def test_legends_name_what_matplotlib_would_hide() -> None:
    table = torch.ones(1, 2, dtype=torch.float64)
    odd = ["_hidden", ""]
    drawn = (
        comparisons.composition(LIGHT, ["a", "b"], [3, 1], [0, 1], odd),
        comparisons.costs(LIGHT, ["p"], odd, {"loss": table}),
        figures.certainty(LIGHT, ["0"], {name: [1.0] for name in odd}, 2.0),
    )
    for figure in drawn:
        (legend,) = figure.legends
        assert [text.get_text().strip() for text in legend.get_texts()] == odd
