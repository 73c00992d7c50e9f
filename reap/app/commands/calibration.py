"""`reap calibrate`: text through a model, statistics out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reap.app.arguments import (
    Backend,
    BatchSize,
    Count,
    CountAfter,
    CountUntil,
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
    count: Count = "all",
    count_after: CountAfter = None,
    count_until: CountUntil = None,
    gates: Annotated[str, typer.Option(help="applied or renormalized")] = "applied",
    pairs: Annotated[bool, typer.Option("--pairs", help="also record pair matrices")] = False,
    backend: Backend = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="the same bits in every run, also on a GPU")
    ] = False,
    mtp: Annotated[
        bool,
        typer.Option("--mtp/--no-mtp", help="also the layer for multi-token prediction, if any"),
    ] = True,
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
    from reap.runs.heads import chosen_mtp
    from reap.runs.partial import Partial
    from reap.statistics.layerstats import check_gates
    from reap.text.sources import local_names, parse_spec

    check_gates(gates)
    check_backend(backend)
    check_dtype(dtype)
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
        "count": count,
        "count_after": count_after,
        "count_until": count_until,
    }
    partial = Partial(out.with_name(out.name + PARTIAL))
    rows = rows_of(folder, sources, seq_len, json, trust_remote_code, domain=domain, **options)
    partial.refuse_other(rows.describe())
    loaded = load_model(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    head, of_head = chosen_mtp(loaded, folder, mtp)
    about = what_runs(loaded, backend, deterministic)
    where = f"{model} in {about['dtype']} on {about['device']}, backend {about['backend']}"
    announce(where, rows.expected, json)
    with partial.kept():
        with reported("calibrating", lambda: rows.expected, "tokens", json) as advance:
            stats = run(
                loaded,
                rows,
                gates=gates,
                pairs=pairs,
                backend=backend,
                deterministic=deterministic,
                mtp=head or False,
                progress=advance,
                partial=partial,
            )
        save_statistics(stats, out, overwrite, json, [*rows.notes(), *of_head])
