"""Rows for the eye: a line each while they come, a table per suite, and two plots."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.row import Row
from bench.shapes import BYTES, Shape

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def line(row: Row) -> str:
    """`layer bf16 qwen3-30b-a3b ... T=1024 reap:cpu 12.3 ms 690 GFLOP/s 83% of peak`."""
    parts = [row.bench, row.dtype, row.shape, f"T={row.T}", row.impl, f"{row.ms_median:.4g} ms"]
    if row.routing == "even":
        parts.insert(4, row.routing)
    if row.host_ms is not None:
        parts.append(f"alone {row.alone_ms:.4g} ms, host {row.host_ms:.3g} ms")
    if row.floor_ms is not None:
        parts.append(f"{row.ms_median / row.floor_ms:.2f}x floor")
    if row.gflops is not None:
        parts.append(f"{row.gflops:.4g} GFLOP/s")
    if row.fraction_of_peak is not None:
        parts.append(f"{row.fraction_of_peak:.0%} of peak")
    return " ".join(parts)


def tables(rows: list[Row], console: Console) -> None:
    """One table per suite, dtype and shape."""
    groups = defaultdict(list)
    for row in rows:
        groups[row.bench, row.dtype, row.shape].append(row)
    for (bench, dtype, shape), group in groups.items():
        table = Table(title=f"{bench} {dtype} {shape}", title_justify="left")
        columns = zip(COLUMNS, zip(*map(_cells, group), strict=True), strict=True)
        used = [(column, cells) for column, cells in columns if any(cells)]
        for column, _ in used:
            left = column in ("impl", "times as fast as")
            table.add_column(column, justify="left" if left else "right", no_wrap=not left)
        for texts in zip(*(cells for _, cells in used), strict=True):
            table.add_row(*map(escape, texts))
        console.print(table)
    for machine in dict.fromkeys(row.machine for row in rows):
        console.print(machine, highlight=False)


COLUMNS = (
    "T",
    "routing",
    "impl",
    "ms",
    "p20-p80",
    "alone ms",
    "host ms",
    "floor ms",
    "x floor",
    "tokens/s",
    "GFLOP/s",
    "of peak",
    "extra MB",
    "MHz",
    "W",
    "times as fast as",
)


def _cells(row: Row) -> list[str]:
    return [
        f"{row.T:,}" if row.T else "",
        row.routing or "",
        row.impl,
        f"{row.ms_median:,.4g}",
        f"{row.ms_p20:,.4g}-{row.ms_p80:,.4g}",
        _number(row.alone_ms, ".4g") + (" (events)" if row.method == "events" else ""),
        _number(row.host_ms, ".3g"),
        _number(row.floor_ms, ".4g"),
        "" if row.floor_ms is None else f"{row.ms_median / row.floor_ms:.2f}",
        f"{row.T / row.ms_median * 1e3:,.0f}" if row.T else "",
        _number(row.gflops, ",.4g"),
        "" if row.fraction_of_peak is None else f"{row.fraction_of_peak:.0%}",
        "" if row.extra_bytes is None else f"{row.extra_bytes / 1e6:,.1f}",
        _number(row.clock_mhz, ".0f"),
        _number(row.power_w, ".0f"),
        ", ".join(f"{peer} {times:.2f}" for peer, times in row.speedup_vs.items()),
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def plots(rows: list[Row], out: Path) -> list[Path]:
    """`roofline-DTYPE.png` and `speedup-DTYPE.png` of the layer rows, where there are any."""
    layers = defaultdict(list)
    for row in rows:
        if row.bench == "layer":
            layers[row.dtype].append(row)
    if not layers:
        return []
    import matplotlib

    matplotlib.use("Agg")
    written = []
    for dtype, group in layers.items():
        written.append(_roofline(group, _bandwidth(rows), out / f"roofline-{dtype}.png"))
        written.append(_speedup(group, out / f"speedup-{dtype}.png"))
    return written


def _bandwidth(rows: list[Row]) -> float | None:
    """Of the `read` row of the same run [bytes/s]."""
    for row in rows:
        if row.bench == "roof" and row.impl == "read":
            return int(row.shape.split()[0]) / row.ms_median * 1e3
    return None


def _roofline(rows: list[Row], bandwidth: float | None, path: Path) -> Path:
    """Achieved GFLOP/s against FLOP per byte at the floor, under the measured roofs."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    dtype = rows[0].dtype
    for impl in dict.fromkeys(row.impl for row in rows):
        own = [row for row in rows if row.impl == impl]
        points = [(Shape.parse(row.shape).intensity(row.T, dtype), row.gflops) for row in own]
        xs, ys = zip(*points, strict=True)
        axes.scatter(xs, ys, s=14, label=impl)
    peaks = [
        row.gflops / row.fraction_of_peak for row in rows if row.gflops and row.fraction_of_peak
    ]
    low, high = axes.get_xlim()
    if peaks:
        axes.axhspan(min(peaks), max(peaks), color="grey", alpha=0.3, label="FMA peak, all rounds")
        if bandwidth:
            ridge = max(peaks) * 1e9 / bandwidth
            ends = [max(low, BYTES[dtype] / 8), ridge]
            rates = [x * bandwidth / 1e9 for x in ends]
            axes.plot(ends, rates, color="grey", label="read bandwidth")
    axes.set(xscale="log", yscale="log", ylabel="GFLOP/s, median")
    axes.set_title(f"{dtype}, {rows[0].machine}")
    axes.set_xlabel("arithmetic intensity at the floor (FLOP per byte)")
    axes.legend(fontsize="small")
    return _save(figure, path)


def _speedup(rows: list[Row], path: Path) -> Path:
    """How many times as fast as each peer, by tokens per expert; above the line we are faster."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    points = defaultdict(list)
    for row in rows:
        shape = Shape.parse(row.shape)
        for peer, times in row.speedup_vs.items():
            points[row.impl, peer].append((row.T * shape.K / shape.E, times))
    for (impl, peer), pairs in points.items():
        xs, ys = zip(*pairs, strict=True)
        axes.scatter(xs, ys, s=14, label=f"{impl} against {peer}")
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(xscale="log", yscale="log", ylabel="times as fast, medians of the same rounds")
    axes.set_xlabel("tokens per expert (T K / E)")
    axes.set_title(f"{rows[0].dtype}, {rows[0].machine}")
    axes.legend(fontsize="small")
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
