"""`reap evaluate`: how well a model predicts text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from reap.app.arguments import Json, LoadOptions, Model, TextOptions, grouped
from reap.app.console import print_json, print_table, reports_errors
from reap.app.longruns import announce, read_on, reported, rows_of, shape_of, where

if TYPE_CHECKING:
    from reap.runs.evaluation import Evaluation


@reports_errors
@grouped
def evaluate(
    model: Model,
    text: TextOptions,
    loading: LoadOptions,
    teacher: Annotated[str | None, typer.Option(help="a model to compare with")] = None,
    json: Json = False,
) -> None:
    """Measure loss and perplexity, and with --teacher also its loss, KL divergence and top-1
    agreement."""
    from reap.files.hub import resolve_model
    from reap.runs.evaluation import evaluate as run

    loading.check()
    sources = text.sources()
    folder = resolve_model(model, loading.revision)
    original = resolve_model(teacher) if teacher else None
    rows = rows_of(folder, text, sources, loading.trust_remote_code)
    against = f"against {teacher}" if teacher else None
    announce("evaluating", model, against, where(folder, loading), shape_of(rows))
    read_on(rows, sources)
    student = loading.load(folder)
    reference = loading.load(original) if original else None
    with reported("evaluating", lambda: rows.expected, "tokens") as advance:
        results = run(student, rows, teacher=reference, progress=advance)
    if json:
        print_json({name: result.to_json() for name, result in results.items()})
    else:
        print_table(f"{folder} (nats per token)", *_table(results))
    for note in rows.notes():
        typer.echo(note, err=json)


def _table(results: dict[str, Evaluation]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows; 80 columns where domains have short names."""
    columns = ["domain", "tokens", "loss", "perplexity"]
    table = [
        [name, f"{r.tokens:,}", f"{r.loss:.4f}", f"{r.perplexity:.3f}"]
        for name, r in results.items()
    ]
    if any(r.kl is not None for r in results.values()):
        columns += ["teacher's loss", "KL", "top-1"]
        for row, r in zip(table, results.values(), strict=True):
            row += [f"{r.teacher_loss:.4f}", f"{r.kl:.4f}", f"{r.agreement:.1%}"]
    return columns, table
