"""`reap evaluate`: how well a model predicts text."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from reap.app.arguments import (
    BatchSize,
    Data,
    Device,
    Domain,
    Dtype,
    Json,
    MaxTokens,
    MaxTokensPerSource,
    Model,
    Pack,
    Revision,
    SeqLen,
    SkipBad,
    TrustRemoteCode,
    rows_of,
)
from reap.app.console import print_json, print_table, reports_errors
from reap.app.longruns import reported


@reports_errors
def evaluate(
    model: Model,
    data: Data,
    teacher: Annotated[str | None, typer.Option(help="a model to compare with")] = None,
    max_tokens: MaxTokens = None,
    max_tokens_per_source: MaxTokensPerSource = None,
    seq_len: SeqLen = None,
    batch_size: BatchSize = 1,
    domain: Domain = None,
    pack: Pack = True,
    skip_bad: SkipBad = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Measure loss and perplexity, and with --teacher KL divergence and top-1 agreement."""
    from reap.files.hub import resolve_model
    from reap.model.load import check_dtype, load_model
    from reap.runs.evaluation import evaluate as run
    from reap.text.sources import parse_spec

    check_dtype(dtype)
    sources = [parse_spec(spec) for spec in data]
    folder = resolve_model(model, revision)
    original = resolve_model(teacher) if teacher else None
    options = {
        "batch_size": batch_size,
        "max_tokens": max_tokens,
        "max_tokens_per_source": max_tokens_per_source,
        "packing": pack,
        "skip_bad": skip_bad,
    }
    rows = rows_of(folder, sources, seq_len, json, trust_remote_code, domain=domain, **options)
    how: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    student = load_model(folder, **how)
    reference = load_model(original, **how) if original else None
    with reported("evaluating", lambda: rows.expected, "tokens", json) as advance:
        results = run(student, rows, teacher=reference, progress=advance)
    if json:
        print_json({name: result.to_json() for name, result in results.items()})
        for note in rows.notes():
            typer.echo(note, err=True)
        return
    columns = ["domain", "tokens", "loss (nats/token)", "perplexity"]
    table = [
        [name, f"{r.tokens:,}", f"{r.loss:.4f}", f"{r.perplexity:.3f}"]
        for name, r in results.items()
    ]
    if reference is not None:
        columns += ["KL (nats/token)", "top-1 agreement"]
        for row, r in zip(table, results.values(), strict=True):
            row += [f"{r.kl:.4f}", f"{r.agreement:.1%}"]
    print_table(str(folder), columns, table)
    for note in rows.notes():
        typer.echo(note)
