"""`reap estimate`: what a calibration will take."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reap.app.arguments import (
    Json,
    LoadOptions,
    MeasureOptions,
    Model,
    TextOptions,
    grouped,
)
from reap.app.commands.calibration import find_model
from reap.app.console import print_json, reports_errors
from reap.app.longruns import lasting, rows_of
from reap.errors import ReapError
from reap.files.units import sized

if TYPE_CHECKING:
    from reap.runs.estimate import Estimate


@reports_errors
@grouped
def estimate(
    model: Model,
    text: TextOptions,
    measuring: MeasureOptions,
    loading: LoadOptions,
    out: Annotated[Path, typer.Option(help="the file that would be written")] = Path("stats"),
    json: Json = False,
) -> None:
    """Say what memory, disk and time `reap calibrate` will take.

    With the same options, after some seconds of trying on this machine's CPU: also the way it will
    run, bytes read and FLOPs. Nothing is written.
    """
    folder = find_model(model, text, measuring, loading, lambda inputs: None)
    found, why = _estimated(folder, text, measuring, loading, out)
    told = asdict(found) | {
        "mode": "in memory" if why is None else f"layer by layer ({why})",
        "disk_free": shutil.disk_usage(out.parent).free,
    }
    if json:
        print_json(told)
        return
    for name, value in _lines(told):
        typer.echo(f"{name:12} {value}")


def _estimated(
    folder: Path, text: TextOptions, measuring: MeasureOptions, loading: LoadOptions, out: Path
) -> tuple[Estimate, str | None]:
    """And why it runs layer by layer; None: in memory."""
    from reap.model.identity import describe_folder
    from reap.model.load import find_device
    from reap.runs import memory
    from reap.runs.estimate import estimate as judge
    from reap.runs.heads import chosen_mtp
    from reap.runs.mode import whole, why_streamed
    from reap.runs.waves import open_layers

    trust = loading.trust_remote_code
    if not trust:
        describe_folder(folder)  # without experts it is refused here
    if (device := find_device(loading.device)) != "cpu":
        raise ReapError(f"only what a run on the CPU takes can be told, not on {device}")
    rows = rows_of(folder, text, text.sources(), trust)
    first = [batch for _ in range(2) if (batch := next(rows, None)) is not None]
    if not first:
        raise ReapError("the calibration data has no tokens: there is nothing to judge by")
    asked = True if measuring.wave_tokens else measuring.stream
    options: dict[str, Any] = {"dtype": loading.dtype, "limit": measuring.limit}
    why = why_streamed(asked, folder, device="cpu", **options)
    limit = memory.allowed() if measuring.limit is None else measuring.limit
    size = whole(folder, loading.dtype)
    layers = open_layers(folder, loading.dtype, trust, limit)
    head, _ = chosen_mtp(layers.model, folder, measuring.mtp)
    found = judge(
        layers,
        first,
        rows.expected,
        layerwise=why is not None,
        whole=size,
        limit=limit,
        scratch=out.parent,
        gates=measuring.gates,
        **measuring.kinds,
        backend=measuring.backend,
        deterministic=measuring.deterministic,
        mtp=head,
        wave_tokens=measuring.wave_tokens,
        domains=len({source["domain"] for source in rows.describe()["sources"]}),
    )
    return found, why


def _lines(told: dict[str, Any]) -> list[tuple[str, str]]:
    unknown = "unknown, as the text's length is"
    seconds, flops, read = (told[name] for name in ("seconds", "flops", "bytes_read"))
    mapped = f", and {sized(told['mapped'])} of mapped files where that is free"
    mapped = mapped if told["mapped"] else ""
    lines = [
        ("mode", told["mode"]),
        ("memory", f"{sized(told['memory'])} at the peak{mapped}"),
        ("weights", f"{sized(told['stored'])} in layers"),
        ("bytes read", unknown if read is None else sized(read)),
        ("disk", f"{sized(told['statistics'])} of statistics, {sized(told['disk_free'])} are free"),
        ("tokens", unknown if told["tokens"] is None else f"about {told['tokens']:,}"),
        ("FLOPs", unknown if flops is None else f"{flops:.2e}"),
        ("rate", f"{told['tokens_per_second']:,.0f} tokens/s beside the reading"),
        ("time", unknown if seconds is None else f"about {lasting(seconds)}"),
    ]
    return lines if told["layerwise"] is False else [*lines, ("waves", told["about"])]
