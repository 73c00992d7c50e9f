"""`reap calibrate`: text through a model, statistics out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    Model,
    Overwrite,
    Pack,
    Revision,
    SeqLen,
    TrustRemoteCode,
    rows_of,
    save_statistics,
)
from reap.app.console import progress, reports_errors
from reap.files.outputs import STATISTICS, check_file


@reports_errors
def calibrate(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="the statistics file to write")],
    max_tokens: MaxTokens = None,
    seq_len: SeqLen = None,
    batch_size: BatchSize = 1,
    domain: Domain = None,
    pack: Pack = True,
    gates: Annotated[str, typer.Option(help="applied or renormalized")] = "applied",
    pairs: Annotated[bool, typer.Option("--pairs", help="also record pair matrices")] = False,
    backend: Backend = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Run MODEL over calibration text and write the statistics of every expert."""
    from reap.files.hub import resolve_model
    from reap.model.identity import describe_folder
    from reap.model.load import load_model
    from reap.observation.patch import check_backend
    from reap.runs.calibration import calibrate as run
    from reap.statistics.layerstats import check_gates
    from reap.text.sources import local_names, parse_spec

    check_gates(gates)
    check_backend(backend)
    sources = [parse_spec(spec) for spec in data]  # before a model is downloaded
    inputs = [model, *(name for source in sources for name in local_names(source))]
    check_file(out, STATISTICS, overwrite=overwrite, inputs=inputs)
    folder = resolve_model(model, revision)
    check_file(out, STATISTICS, overwrite=overwrite, inputs=[folder])  # of a hub id, its cache
    if not trust_remote_code:
        describe_folder(folder)  # a model without experts is refused before its weights are loaded
    options = {"batch_size": batch_size, "max_tokens": max_tokens, "packing": pack}
    rows = rows_of(folder, sources, seq_len, trust_remote_code, domain=domain, **options)
    loaded = load_model(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    with progress("calibrating", lambda: rows.expected, "tokens") as advance:
        stats = run(loaded, rows, gates=gates, pairs=pairs, backend=backend, progress=advance)
    save_statistics(stats, out, overwrite, json)
