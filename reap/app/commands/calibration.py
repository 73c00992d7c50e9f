"""`reap calibrate`: text through a model, statistics out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reap.app.arguments import (
    Json,
    LoadOptions,
    MeasureOptions,
    Model,
    Overwrite,
    StopOptions,
    TextOptions,
    TraceOptions,
    grouped,
)
from reap.app.console import legible, print_json, reports_errors
from reap.app.longruns import announce, read_on, reported, rows_of, shape_of, verdict, where
from reap.app.together import Together, together
from reap.errors import ReapError
from reap.files.outputs import STATISTICS, check_file
from reap.files.units import counted

if TYPE_CHECKING:
    from reap.model.info import ModelInfo
    from reap.runs.stability import Stable
    from reap.statistics.stats import Statistics
    from reap.statistics.trace import Trace


@reports_errors
@grouped
def calibrate(
    model: Model,
    text: TextOptions,
    out: Annotated[Path, typer.Option(help="the statistics file to write")],
    measuring: MeasureOptions,
    loading: LoadOptions,
    stopping: StopOptions,
    tracing: TraceOptions,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="only share I, from 0 to N-1, of N; combine adds all"),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Run MODEL over text and write the statistics of every expert.

    Started by torchrun, several processes do it together; with --shard they need not know of each
    other.
    """

    def check(inputs: Sequence[str | Path]) -> None:
        check_file(out, STATISTICS, overwrite=overwrite, inputs=inputs)
        tracing.check(out, overwrite, inputs)

    until = stopping.until()

    traces: list[Trace] = []

    def accept(found: ModelInfo) -> None:
        if until is not None:
            until.check(found)
        trace = tracing.begin(found, overwrite)
        traces.extend([] if trace is None else [trace])

    with together(shard) as all_of_us:
        if tracing.trace is not None and all_of_us.share is not None:
            raise ReapError(
                "--trace is of the first tokens of a run in one process, and this process has a "
                "share of them: leave one of them out"
            )
        if until is not None and all_of_us.share is not None and all_of_us.ranks is None:
            raise ReapError(
                "--until-stable looks at all batches, and shards do not know of each other: leave "
                "out --shard, or start ranks by torchrun, which do"
            )
        loading = replace(loading, device=all_of_us.device(loading.device))
        folder = find_model(model, text, measuring, loading, check)
        options = text, measuring, loading
        with measured(model, folder, *options, out, accept, until, all_of_us, traces) as found:
            stats, notes = found
            saved = save_statistics(stats, out, overwrite, notes) if all_of_us.writes else None
    if saved is not None and json:
        print_json(saved)
    elif saved is not None:
        tell_statistics(saved)


def find_model(
    model: str,
    text: TextOptions,
    measuring: MeasureOptions,
    loading: LoadOptions,
    check: Callable[[Sequence[str | Path]], None],
) -> Path:
    """The folder of `model`, behind every check that needs no model. `check` is called with what
    will be read, before a download and after it."""
    from reap.files.hub import resolve_model
    from reap.text.sources import local_names

    measuring.check()
    loading.check()
    check([model, *(name for source in text.sources() for name in local_names(source))])
    folder = resolve_model(model, loading.revision)
    check([folder])  # of a hub id, its cache
    return folder


@contextmanager
def measured(
    model: str,
    folder: Path,
    text: TextOptions,
    measuring: MeasureOptions,
    loading: LoadOptions,
    out: Path,
    accept: Callable[[ModelInfo], None],
    until: Stable | None = None,
    all_of_us: Together | None = None,
    traces: Sequence[Trace] = (),
) -> Iterator[tuple[Statistics, list[str]]]:
    """The statistics of the text, and notes on it, to be written to `out`. Until the end of the
    `with` what was measured is kept beside it, for the same command to go on from. `accept` hears
    of the model as early as can be, and may refuse it. With `until` it may end before the text. The
    work is shared with `all_of_us`. `traces`: the trace that `accept` began, if any."""
    from reap.model.identity import describe, describe_folder
    from reap.model.load import find_device
    from reap.runs.calibration import calibrate as run
    from reap.runs.disk import check_disk, statistics_size
    from reap.runs.heads import chosen_mtp
    from reap.runs.mode import why_streamed
    from reap.runs.partial import Partial
    from reap.runs.waves import calibrate_streamed, open_layers

    us = all_of_us or Together()
    trust = loading.trust_remote_code
    if not trust:
        found = describe_folder(folder)  # without experts it is refused here too
        accept(found)
        domains = {source.domain for source in text.sources()}
        check_disk(out, statistics_size(found, domains=len(domains), **measuring.kinds))
    partial = Partial(us.partial_file(out))
    sources = text.sources()
    rows = rows_of(folder, text, sources, trust, us.share)
    partial.refuse_other(rows.describe())
    partial.refuse_trace(next(iter(traces), None))
    modes = [f"gates {measuring.gates}", "pairs" if measuring.pairs else None]
    modes += [name for name in ("outputs", "coalitions", "logits") if measuring.kinds[name]]
    modes += ["deterministic" if measuring.deterministic else None]
    if until is not None:
        until.check_text(rows)
        modes += [f"until ratio {until.ratio} is stable"]
    runs = where(folder, loading, measuring.backend)
    streamed = why_streamed(
        True if measuring.wave_tokens else measuring.stream,
        folder,
        dtype=loading.dtype,
        device=loading.device,
        limit=measuring.limit,
    )
    modes += [verdict(folder, loading, streamed)]
    announce("calibrating", model, runs, *modes, us.said(), shape_of(rows))
    read_on(rows, sources)
    us.check_same(folder, rows, measuring, loading, out, until)
    layers = None
    if streamed is not None:
        device = find_device(loading.device)
        layers = open_layers(folder, loading.dtype, trust, measuring.limit, device)
    loaded = loading.load(folder) if layers is None else layers.model
    us.check_same_run(loaded, measuring)
    if trust:
        accept(describe(loaded))
    head, of_head = chosen_mtp(loaded, folder, measuring.mtp)
    with partial.kept():
        with reported("calibrating", lambda: rows.expected_here, "tokens") as advance:
            options: dict[str, Any] = {
                "gates": measuring.gates,
                **measuring.kinds,
                "trace": next(iter(traces), None),
                "backend": measuring.backend,
                "deterministic": measuring.deterministic,
                "mtp": head or False,
                "progress": advance,
                "partial": partial,
                "until": until,
                "ranks": us.ranks,
            }
            if layers is None:
                stats = run(loaded, rows, **options)
            else:
                stats = calibrate_streamed(
                    layers,
                    rows,
                    **options,
                    memory_limit=measuring.limit,
                    wave_tokens=measuring.wave_tokens,
                    scratch=out.parent,
                    say=lambda line: announce("calibrating", f"layer by layer ({streamed})", line),
                )
        del loaded, layers, head, options  # their memory, for what follows
        yield us.sum_of_all(stats, partial, rows, out), [*rows.notes(), *of_head]
        us.release()


def save_statistics(
    stats: Statistics, out: Path, overwrite: bool, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Write a statistics file; what is in it, and what of the text is not."""
    stats.save(out, overwrite=overwrite)
    return {
        "out": str(out),
        "tokens": stats.tokens,
        "layers": len(stats.layers),
        "domains": list(stats.domains),
        "ended": [entry["ended"] for entry in stats.data if "ended" in entry],
        "notes": list(notes),
    }


def tell_statistics(saved: dict[str, Any]) -> None:
    """Of what `save_statistics` returns."""
    domains = legible(", ".join(saved["domains"]))
    typer.echo(
        f"{saved['out']}: {counted(saved['tokens'], 'token')} through "
        f"{counted(saved['layers'], 'MoE layer')}, domains {domains}"
    )
    for note in (*saved["ended"], *saved["notes"]):
        typer.echo(note)
