"""`python -m bench [SUITE ...]`: runs suites, appends rows to files, prints and plots them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Collection
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from bench import calibrate, inputs, layer, report
from bench.gate import WrongResult
from bench.measure import PRESETS, TORCH, Settings
from bench.row import Log, Row
from bench.shapes import REAL, TINY
from reap_kernels import cpu

SUITES = {
    "roof": "bench.roofs",
    "layer": "bench.layer",
    "norms": "bench.norms",
    "sums": "bench.sums",
    "calibrate": "bench.calibrate",
    "prune": "bench.prune",
    "stats": "bench.stats",
    "stream": "bench.stream",
    "ranks": "bench.ranks",
    "masks": "bench.masks",
}
ON_GPU = ("layer", "norms", "sums", "calibrate", "stats", "masks")
Suite = Enum("Suite", dict(zip(SUITES, SUITES, strict=True)), type=str)  # type: ignore[misc]
Device = Enum("Device", {"cpu": "cpu", "cuda": "cuda"}, type=str)
SHAPES = {**REAL, TINY.name: TINY}

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    suites: Annotated[list[Suite] | None, typer.Argument(help="all of them by default")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="one shape: minutes")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="tiny shapes, no figures")] = False,
    out: Annotated[Path, typer.Option(help="folder that rows are appended to")] = Path("out/bench"),
    dtype: Annotated[str | None, typer.Option(help="of bf16, fp32, fp16; by comma")] = None,
    shapes: Annotated[str | None, typer.Option(help="names, by comma; see bench/shapes.py")] = None,
    tokens: Annotated[str | None, typer.Option(help="T of the layer suite, by comma")] = None,
    impls: Annotated[str | None, typer.Option(help="of `layer` and `calibrate`, by comma")] = None,
    isas: Annotated[str | None, typer.Option(help="of `layer`, besides the best; by comma")] = None,
    routing: Annotated[str | None, typer.Option(help="of `layer`: uniform, even; by comma")] = None,
    device: Annotated[Device, typer.Option(help="of layer, norms, calibrate, stats")] = Device.cpu,
    threads: Annotated[int | None, typer.Option(min=1, help="torch's own by default")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="samples of each")] = None,
    seconds: Annotated[float | None, typer.Option(help="for each impl and size")] = None,
    gigabytes: Annotated[
        float | None, typer.Option(help="of the checkpoint of `prune`, `stream`, `ranks`")
    ] = None,
    limit: Annotated[
        str | None, typer.Option(help="of `stream`: memory that it may take, 4G say")
    ] = None,
    llmcompressor_python: Annotated[
        Path | None, typer.Option(help="a python that has llmcompressor, for `calibrate`")
    ] = None,
    official_repository: Annotated[
        Path | None,
        typer.Option(help="a checkout of CerebrasResearch/reap with a .venv, for `calibrate`"),
    ] = None,
) -> None:
    """Measure this engine beside its peers on this machine."""
    if quick and smoke:
        raise typer.BadParameter("give --quick or --smoke, not both")
    # A table in a file or pipe must not be cut to 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 160)
    mode = "smoke" if smoke else "quick" if quick else "full"
    given: dict[str, Any] = {
        "dtypes": _names("--dtype", dtype, TORCH),
        "shapes": _chosen_shapes(shapes),
        "tokens": _tokens(tokens),
        "impls": _names("--impls", impls, dict.fromkeys(layer.IMPLS + calibrate.FORWARDS)),
        "isas": _names("--isas", isas, () if cpu.available() else cpu.isas()),
        "routings": _names("--routing", routing, inputs.ROUTINGS),
        "device": device.value,
        "rounds": rounds,
        "seconds": seconds,
        "gigabytes": gigabytes,
        "limit": limit,
        "llmcompressor": llmcompressor_python,
        "official": official_repository,
        "scratch": out / "scratch",
        "say": lambda line: console.print(line, highlight=False, markup=False),
    }
    settings = replace(PRESETS[mode], **{k: v for k, v in given.items() if v is not None})
    if threads is not None:
        torch.set_num_threads(threads)
    names = [suite.value for suite in suites or Suite]
    if device is Device.cuda:
        names = _on_gpu(names if suites else list(ON_GPU), isas)
    _, refused = run(names, settings, out, console)
    if refused:
        raise typer.Exit(1)


def run(
    suites: list[str], settings: Settings, out: Path, console: Console
) -> tuple[list[Row], list[str]]:
    """The rows, each written as soon as it is measured, and the suites that a wrong one ended."""
    log = Log(out)
    refused: list[str] = []
    try:
        for suite in suites:
            try:
                for row in importlib.import_module(SUITES[suite]).run(settings):
                    log.add(row)
                    settings.say(report.line(row))
            except WrongResult as error:
                settings.say(f"{suite}: stops, nothing wrong is timed: {error}")
                refused.append(suite)
    finally:
        report.tables(log.rows, console)
        for path in [log.jsonl, log.csv, *_plots(log.rows, out, settings)]:
            settings.say(f"wrote {path}")
    return log.rows, refused


def _plots(rows: list[Row], out: Path, settings: Settings) -> list[Path]:
    if importlib.util.find_spec("matplotlib") is None:
        settings.say("no plots: matplotlib is not installed")
        return []
    return report.plots(rows, out)


def _on_gpu(suites: list[str], isas: str | None) -> list[str]:
    if wrong := [suite for suite in suites if suite not in ON_GPU]:
        raise typer.BadParameter(
            f"--device cuda: only {', '.join(ON_GPU)} run there, not {', '.join(wrong)}"
        )
    if isas is not None:
        raise typer.BadParameter("--isas are those of --device cpu")
    if not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda: torch finds no GPU")
    return suites


def _names(option: str, text: str | None, known: Collection[str]) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(text.split(","))
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{option} {name!r}: it must be one of {', '.join(known)}")
    return names


def _chosen_shapes(text: str | None) -> tuple | None:
    names = _names("--shapes", text, SHAPES)
    return names and tuple(SHAPES[name] for name in names)


def _tokens(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if not all(part.isdigit() and int(part) > 0 for part in text.split(",")):
        raise typer.BadParameter(f"--tokens {text!r}: it must be positive numbers by comma")
    return tuple(sorted(map(int, text.split(","))))


if __name__ == "__main__":
    app()
