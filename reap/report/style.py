"""How our figures look, and how they become SVG and PNG: import this to draw others like them.

    @themed
    def losses(theme: Theme, losses: list[float]) -> Figure:
        figure, axes = canvas(WIDTH, 3)
        axes.plot(losses, color=theme.series[0])
        return figure

    save(losses, (losses_measured,), folder, "losses")  # losses.svg and losses.png

The series are told apart by colour-blind people too (after Okabe and Ito, "Color Universal Design",
2008), in light and in dark; `cividis` (Nunez et al., PLoS ONE 13(7), 2018) is the scale of images.
An SVG keeps its text as text. `inline` puts CSS variables in place of the light colours, so that in
a page one drawing follows the reader's choice of light and dark.
"""

from __future__ import annotations

import functools
import io
import re
import warnings
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from reap.errors import ReapError
from reap.files.atomic import write_file

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError:
    raise ReapError(
        "figures need packages that are not there: pip install matplotlib jinja2"
    ) from None

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 11.4  # inches: 1,094 px of a page
SCALE = "cividis"  # of images: from low to high, in either theme
DIVERGING = "PuOr_r"  # of images whose middle means something
MARK = "#ff6a13"  # on images, which have the same colours in both themes
ON_DARK, ON_LIGHT = "#fefefe", "#010101"  # text on images
SMALL_SVG = 1 << 18  # bytes; a longer one may be shorter as a PNG for each theme, which takes time
PNG_DPI = 150
CREATOR = "reap-report"
FONT = "DejaVu Sans"  # which matplotlib brings

P = ParamSpec("P")
Draw = Callable[..., Figure]  # of a Theme, and what is drawn


@dataclass(frozen=True)
class Theme:
    """Colours as #rrggbb. In LIGHT no two are the same."""

    paper: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]


LIGHT = Theme(
    paper="#ffffff",
    ink="#1b1f24",
    muted="#57606a",
    grid="#d5dbe1",
    series=("#0072b2", "#c75300", "#00875f", "#a63a79", "#8a6d00", "#5e4fb0"),
)
DARK = Theme(
    paper="#14181d",
    ink="#e8edf2",
    muted="#a3adb8",
    grid="#39424c",
    series=("#56b4e9", "#ff8b3d", "#2fcf9f", "#ec8fc4", "#e0c341", "#b3a6ff"),
)
MARKERS = "osD^vP"  # of the series, for who sees no colours


def themed(
    draw: Callable[Concatenate[Theme, P], Figure],
) -> Callable[Concatenate[Theme, P], Figure]:
    """A function that draws, under the settings of the theme that it is given first."""

    @functools.wraps(draw)
    def run(theme: Theme, *args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(_settings(theme)):
            return draw(theme, *args, **kwargs)

    return run


def canvas(width: float, height: float, **room: float) -> tuple[Figure, Axes]:
    """A figure of this size in inches with one pair of axes, `room` inches inside its left, right,
    top and bottom."""
    inches = {"left": 0.75, "right": 0.15, "top": 0.15, "bottom": 0.5, **room}
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes(
        (
            inches["left"] / width,
            inches["bottom"] / height,
            1 - (inches["left"] + inches["right"]) / width,
            1 - (inches["top"] + inches["bottom"]) / height,
        )
    )
    return figure, axes


def svg_of(figure: Figure) -> str:
    """Without a date: of equal figures the same text."""
    text = io.StringIO()
    with _rendering():
        figure.savefig(
            text,
            format="svg",
            facecolor=figure.get_facecolor(),
            metadata={"Date": None, "Creator": CREATOR},
        )
    return text.getvalue()


def png_of(figure: Figure, dpi: int = PNG_DPI) -> bytes:
    raw = io.BytesIO()
    with _rendering():
        figure.savefig(raw, format="png", dpi=dpi, metadata={"Software": CREATOR})
    return raw.getvalue()


def save(
    draw: Draw, given: tuple[Any, ...], folder: Path, name: str, *, overwrite: bool = False
) -> list[Path]:
    """Draw in LIGHT and write NAME.svg and NAME.png into the folder, each whole or not at all."""
    figure = draw(LIGHT, *given)
    contents = {"svg": svg_of(figure).encode(), "png": png_of(figure)}
    paths = [folder / f"{name}.{form}" for form in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        write_file(path, content, overwrite=overwrite)
    return paths


def inline(draw: Draw, given: tuple[Any, ...], name: str, said: str) -> tuple[str, Figure]:
    """HTML of a figure for a page with the `variables` of both themes, and the figure. As SVG, or
    as a PNG per theme where these are shorter. `name` begins the ids in it, which are of [a-z0-9-];
    `said` is what it shows, in words and without markup."""
    from markupsafe import escape

    figure = draw(LIGHT, *given)
    label = str(escape(said))
    svg = _inlined(svg_of(figure), name, label)
    if len(svg) > SMALL_SVG:
        light, dark = (
            f"data:image/png;base64,{b64encode(png_of(draw(theme, *given))).decode()}"
            for theme in (LIGHT, DARK)
        )
        width, height = (round(96 * inches) for inches in figure.get_size_inches())
        picture = (
            f'<picture><source media="screen and (prefers-color-scheme: dark)" srcset="{dark}">'
            f'<img src="{light}" alt="{label}" width="{width}" height="{height}"></picture>'
        )
        if len(picture) < len(svg):
            return picture, figure
    return svg, figure


def variables(theme: Theme) -> str:
    """The CSS declarations that inlined figures take their colours from."""
    return " ".join(f"--{name}: {colour};" for name, colour in _named(theme).items())


def _named(theme: Theme) -> dict[str, str]:
    plain = {name: getattr(theme, name) for name in ("paper", "ink", "muted", "grid")}
    return plain | {f"series-{number}": colour for number, colour in enumerate(theme.series)}


def _inlined(svg: str, name: str, label: str) -> str:
    """Of an SVG file what belongs into HTML: ids that no other figure has, colours by name, the
    reader's own font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(?<=\bid=")(?=[^"]+")', f"{name}-", svg)
    svg = re.sub(r'(?<=url\(#)|(?<=href="#)', f"{name}-", svg)
    names = {colour: variable for variable, colour in _named(LIGHT).items()}
    svg = re.sub(
        r"#[0-9a-f]{6}(?=[;\"])",
        lambda match: f"var(--{names[match[0]]})" if match[0] in names else match[0],
        svg,
    )
    svg = re.sub(rf"'{FONT}'[^;\"]*", "system-ui, sans-serif", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


@contextmanager
def _rendering() -> Iterator[None]:
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": CREATOR}):
        with warnings.catch_warnings():  # a reader's fonts have what matplotlib's lacks
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            yield


def _settings(theme: Theme) -> Any:
    lines = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), theme.muted)
    letters = ["text.color", "axes.labelcolor", "axes.titlecolor", "legend.labelcolor"]
    letters += ["xtick.labelcolor", "ytick.labelcolor"]
    return {
        **lines,
        **dict.fromkeys(letters, theme.ink),
        "figure.facecolor": theme.paper,
        "axes.facecolor": "none",
        "savefig.facecolor": theme.paper,
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "axes.grid": False,
        "axes.axisbelow": True,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.labelsize": 9,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "font.size": 9,
        "font.family": [FONT],
        "text.parse_math": False,  # a name may hold anything
        "axes.unicode_minus": True,
        "lines.linewidth": 1.4,
        "image.cmap": SCALE,
    }
