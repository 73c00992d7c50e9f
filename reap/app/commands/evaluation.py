"""`reap evaluate`: how well a model predicts text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reap.app.arguments import Json, LoadOptions, Model, TextOptions, grouped
from reap.app.console import print_json, print_table, reports_errors
from reap.app.longruns import announce, read_on, reported, rows_of, shape_of, where
from reap.errors import ReapError

if TYPE_CHECKING:
    from reap.planning.plan import Plan
    from reap.runs.evaluation import Evaluation


@reports_errors
@grouped
def evaluate(
    model: Model,
    text: TextOptions,
    loading: LoadOptions,
    teacher: Annotated[str | None, typer.Option(help="a model to compare with")] = None,
    plan: Annotated[
        list[Path] | None,
        typer.Option(help="as if MODEL was pruned by it, compared with MODEL; repeat for more"),
    ] = None,
    json: Json = False,
) -> None:
    """Measure loss and perplexity, and with --teacher also its loss, KL divergence and top-1
    agreement; with --plan so for each plan, without pruning, against the whole model."""
    from reap.files.hub import resolve_model
    from reap.runs.evaluation import evaluate as run

    loading.check()
    plans = _plans(plan or [])
    sources = text.sources()
    folder = resolve_model(model, loading.revision)
    original = resolve_model(teacher) if teacher else None
    _check_plans(folder, plans)
    rows = rows_of(folder, text, sources, loading.trust_remote_code)
    by = f"masked by {len(plans)} plan{'s' if len(plans) > 1 else ''}" if plans else None
    against = f"against {teacher or 'the whole model'}" if teacher or plans else None
    announce("evaluating", model, by, against, where(folder, loading), shape_of(rows))
    read_on(rows, sources)
    student = loading.load(folder)
    reference = loading.load(original) if original else None
    with reported("evaluating", lambda: rows.expected, "tokens") as advance:
        if plans:
            found = run(student, rows, teacher=reference, plans=plans, progress=advance)
        else:
            found = {"": run(student, rows, teacher=reference, progress=advance)}
    if json:
        told = {name: _json(results) for name, results in found.items()}
        print_json(told if plans else told[""])
    else:
        print_table(f"{folder} (nats per token)", *_table(found))
    for note in rows.notes():
        typer.echo(note, err=json)


def _plans(paths: list[Path]) -> dict[str, Plan]:
    from reap.planning.plan import Plan

    plans: dict[str, Plan] = {}
    for path in paths:
        if str(path) in plans:
            raise ReapError(f"--plan {path} is given twice: once is enough")
        plans[str(path)] = Plan.load(path)
    return plans


def _check_plans(folder: Path, plans: dict[str, Plan]) -> None:
    """Before text is read and a model loaded."""
    from reap.runs.masking import check_plan_of

    for name, plan in plans.items():
        try:
            check_plan_of(folder, plan)
        except ReapError as error:
            raise ReapError(f"{name}: {error}") from error


def _json(results: dict[str, Evaluation]) -> dict[str, dict[str, float]]:
    return {domain: result.to_json() for domain, result in results.items()}


def _table(found: dict[str, dict[str, Evaluation]]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, of results by plan ("" without); 80 columns where names are short."""
    columns, table = ["domain", "tokens", "loss", "perplexity"], []
    named = list(found) != [""]
    compared = any(r.kl is not None for results in found.values() for r in results.values())
    for plan, results in found.items():
        for domain, r in results.items():
            row = [domain, f"{r.tokens:,}", f"{r.loss:.4f}", f"{r.perplexity:.3f}"]
            if compared:
                row += [f"{r.teacher_loss:.4f}", f"{r.kl:.4f}", f"{r.agreement:.1%}"]
            table.append([plan, *row] if named else row)
    if compared:
        columns += ["teacher's loss", "KL", "top-1"]
    return (["plan", *columns] if named else columns), table
