"""How figures look, and how they become files and parts of a page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from madeup import HOSTILE
from matplotlib.figure import Figure
from PIL import Image

from reap.report import style
from reap.report.style import DARK, LIGHT, Theme, canvas, inline, png_of, save, svg_of, themed


@themed
def lines(theme: Theme, label: str, count: int = 1) -> Figure:
    figure, axes = canvas(4, 2)
    for number in range(count):
        axes.plot([0, 1], [number, 1], color=theme.series[0], label=label)
    axes.set_title(label)
    return figure


def luminance(colour: str) -> float:
    """WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_everything_stands_out_from_the_paper(theme: Theme) -> None:
    assert contrast(theme.ink, theme.paper) >= 7 and contrast(theme.muted, theme.paper) >= 4.5
    for colour in theme.series:
        assert contrast(colour, theme.paper) >= 3, colour


def test_a_colour_of_light_has_one_name() -> None:
    named = style._named(LIGHT)
    assert len(set(named.values())) == len(named) == len(style._named(DARK))
    assert not {style.MARK, style.ON_DARK, style.ON_LIGHT} & set(named.values())


def test_svg_is_the_same_text_each_time() -> None:
    one, other = (svg_of(lines(LIGHT, "a")) for _ in range(2))
    assert one == other and style.CREATOR in one[:2000] and ">a</text>" in one
    ElementTree.fromstring(one)


def test_themes_are_of_one_figure_alone() -> None:
    assert LIGHT.ink in svg_of(lines(LIGHT, "a"))
    dark = svg_of(lines(DARK, "a"))
    assert DARK.ink in dark and DARK.paper in dark and LIGHT.ink not in dark


def test_files(tmp_path: Path) -> None:
    svg, png = save(lines, ("a",), tmp_path, "one")
    assert (svg.name, png.name) == ("one.svg", "one.png")
    ElementTree.parse(svg)
    with Image.open(png) as image:
        assert image.size == (4 * style.PNG_DPI, 2 * style.PNG_DPI)
        assert image.text["Software"] == style.CREATOR
    with pytest.raises(ValueError, match="exists"):
        save(lines, ("a",), tmp_path, "one")
    save(lines, ("b",), tmp_path, "one", overwrite=True)
    assert ">b</text>" in svg.read_text()


def test_inlined() -> None:
    html, figure = inline(lines, (HOSTILE.replace("\x00", ""),), "name", HOSTILE)
    assert html.startswith("<svg role=") and len(figure.axes) == 1
    assert "<script>" not in html and "<metadata>" not in html
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert ids and len(ids) == len(set(ids)) and all(one.startswith("name-") for one in ids)
    assert set(re.findall(r'(?:url\(#|href="#)([^")]*)', html)) <= set(ids)
    assert "var(--ink)" in html and "var(--series-0)" in html
    assert LIGHT.ink not in html and LIGHT.series[0] not in html and "DejaVu" not in html
    defined = style.variables(LIGHT)
    assert all(f"{name}:" in defined for name in re.findall(r"var\((--[^)]*)\)", html))


def test_the_shorter_of_svg_and_png(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(count: int) -> str:
        return inline(lines, ("a", count), "name", 'said "so"')[0]

    monkeypatch.setattr(style, "SMALL_SVG", 0)
    assert drawn(1).startswith("<svg")  # a PNG would be longer
    many = drawn(200)
    assert many.startswith("<picture><source media=") and many.count("data:image/png") == 2
    assert 'alt="said &#34;so&#34;"' in many and 'width="384" height="192"' in many
    monkeypatch.setattr(style, "SMALL_SVG", 1 << 30)
    assert drawn(200).startswith("<svg")


def test_names_are_never_mathematics() -> None:
    for name in ("$\\frac{", "a_b^c$$", "$x$"):
        assert png_of(lines(LIGHT, name), dpi=30).startswith(b"\x89PNG")
        assert name in svg_of(lines(LIGHT, name)).replace("&lt;", "<")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib
    import sys

    loaded: dict[str, Any] = {name: sys.modules[name] for name in ("reap.report.style",)}
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "reap.report.style")
    with pytest.raises(ValueError, match="pip install matplotlib jinja2"):
        importlib.import_module("reap.report.style")
    sys.modules.update(loaded)
