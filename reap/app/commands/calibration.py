"""`reap calibrate`: text through a model, statistics out."""

from __future__ import annotations

from functools import partial as partially
from pathlib import Path
from typing import Annotated, Any

import typer

from reap.app.arguments import (
    Backend,
    BatchSize,
    Data,
    Device,
    Domain,
    Dtype,
    Json,
    MaxTokens,
    MaxTokensPerSource,
    Model,
    Overwrite,
    Pack,
    Revision,
    SeqLen,
    SkipBad,
    TrustRemoteCode,
    rows_of,
    save_statistics,
)
from reap.app.console import reports_errors
from reap.app.longruns import announce, reported
from reap.errors import ReapError
from reap.files.outputs import STATISTICS, check_file

PARTIAL = ".partial.safetensors"  # behind the output's name


@reports_errors
def calibrate(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="the statistics file to write")],
    max_tokens: MaxTokens = None,
    max_tokens_per_source: MaxTokensPerSource = None,
    seq_len: SeqLen = None,
    batch_size: BatchSize = 1,
    domain: Domain = None,
    pack: Pack = True,
    skip_bad: SkipBad = False,
    gates: Annotated[str, typer.Option(help="applied or renormalized")] = "applied",
    pairs: Annotated[bool, typer.Option("--pairs", help="also record pair matrices")] = False,
    backend: Backend = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="the same bits in every run, also on a GPU")
    ] = False,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="one layer in memory at a time; by itself where the model does not fit",
        ),
    ] = None,
    memory_limit: Annotated[
        str | None, typer.Option(help="of memory, like 24G; without it all that is free")
    ] = None,
    wave_tokens: Annotated[
        int | None, typer.Option(min=1, help="of --stream: tokens at a time, which a kill may lose")
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Run MODEL over calibration text and write the statistics of every expert."""
    from reap.files.hub import resolve_model
    from reap.model.identity import describe_folder
    from reap.model.load import check_dtype, load_model
    from reap.observation.patch import check_backend
    from reap.runs.calibration import calibrate as run
    from reap.runs.calibration import what_runs
    from reap.runs.memory import parse_size
    from reap.runs.mode import why_streamed
    from reap.runs.partial import Partial
    from reap.runs.waves import calibrate_streamed
    from reap.statistics.layerstats import check_gates
    from reap.text.sources import local_names, parse_spec

    check_gates(gates)
    check_backend(backend)
    check_dtype(dtype)
    limit = None if memory_limit is None else parse_size(memory_limit)
    if stream is False and (limit is not None or wave_tokens is not None):
        raise ReapError("--memory-limit and --wave-tokens are for --stream, not for --no-stream")
    sources = [parse_spec(spec) for spec in data]  # before a model is downloaded
    inputs = [model, *(name for source in sources for name in local_names(source))]
    check_file(out, STATISTICS, overwrite=overwrite, inputs=inputs)
    folder = resolve_model(model, revision)
    check_file(out, STATISTICS, overwrite=overwrite, inputs=[folder])  # of a hub id, its cache
    if not trust_remote_code:
        describe_folder(folder)  # a model without experts is refused before its weights are loaded
    options = {
        "batch_size": batch_size,
        "max_tokens": max_tokens,
        "max_tokens_per_source": max_tokens_per_source,
        "packing": pack,
        "skip_bad": skip_bad,
    }
    partial = Partial(out.with_name(out.name + PARTIAL))
    rows = rows_of(folder, sources, seq_len, json, trust_remote_code, domain=domain, **options)
    partial.refuse_other(rows.describe())
    asked = True if wave_tokens is not None else stream
    streamed = why_streamed(asked, folder, dtype=dtype, device=device, limit=limit)
    measured: dict[str, Any] = {
        "gates": gates,
        "pairs": pairs,
        "backend": backend,
        "deterministic": deterministic,
        "partial": partial,
    }
    if streamed is None:
        loaded = load_model(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        about = what_runs(loaded, backend, deterministic)
        where = f"{model} in {about['dtype']} on {about['device']}, backend {about['backend']}"
        announce(where, rows.expected, json)
        call = partially(run, loaded, rows, **measured)
    else:

        def say(line: str) -> None:
            typer.echo(f"reap: {model} runs layer by layer ({streamed}): {line}", err=True)

        measured |= {"dtype": dtype, "trust_remote_code": trust_remote_code, "say": say}
        measured |= {"memory_limit": limit, "wave_tokens": wave_tokens, "scratch": out.parent}
        call = partially(calibrate_streamed, folder, rows, **measured)
    with partial.kept():
        with reported("calibrating", lambda: rows.expected, "tokens", json) as advance:
            stats = call(progress=advance)
        save_statistics(stats, out, overwrite, json, rows.notes())
