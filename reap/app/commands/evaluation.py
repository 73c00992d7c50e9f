"""`reap evaluate`: how well a model predicts text."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reap.app.arguments import Json, LoadOptions, Model, grouped
from reap.app.console import print_json, print_table, reports_errors
from reap.app.longruns import announce, read_on, reported, rows_of, shape_of, where
from reap.app.trials import EvaluatedText, Found, GenerateOptions, TaskOptions, Trials
from reap.errors import ReapError
from reap.files.units import counted

if TYPE_CHECKING:
    from torch import Tensor

    from reap.planning.plan import Plan
    from reap.runs.tasks import Tasks
    from reap.text.batching import Batch, Batches
    from reap.text.sources import Source


@reports_errors
@grouped
def evaluate(
    model: Model,
    text: EvaluatedText,
    loading: LoadOptions,
    generating: GenerateOptions,
    asking: TaskOptions,
    teacher: Annotated[str | None, typer.Option(help="a model to compare with")] = None,
    teacher_revision: Annotated[
        str | None, typer.Option(help="branch, tag or commit of --teacher, where that is a hub id")
    ] = None,
    plan: Annotated[
        list[Path] | None,
        typer.Option(help="as if MODEL was pruned by it, compared with MODEL; repeat for more"),
    ] = None,
    card: Annotated[
        bool,
        typer.Option(
            "--card", help="write it into README.md and reap.json of MODEL, a pruned folder"
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Measure loss, and what pruning cost.

    Loss and perplexity; with --teacher also its loss, KL divergence and top-1 agreement; with
    --plan so for each plan, without pruning, against the whole model.

    With --generate also how often generated text loops or ends, and with --tasks what
    lm-evaluation-harness measures (pip install 'lm-eval[hf]'), of every model compared.
    """
    from reap.checkpoint.evaluations import check_recordable, record_evaluation
    from reap.files.hub import resolve_model
    from reap.model.load import load_tokenizer
    from reap.runs.mode import check_fits

    loading.check()
    plans = _plans(plan or [])
    _check_asked(text, asking, plans, card)
    if teacher_revision is not None and teacher is None:
        raise ReapError("--teacher-revision is of --teacher: give that too")
    sources = text.sources()
    folder = resolve_model(model, loading.revision)
    original = resolve_model(teacher, teacher_revision) if teacher else None
    if card:
        check_recordable(folder)
    _check_plans(folder, plans)
    loaded = [each for each in (folder, original) if each is not None]
    check_fits(*loaded, dtype=loading.dtype, device=loading.device)
    for each in loaded:
        generating.check(each, text, loading.trust_remote_code)
    tasks = asking.load()
    rows = rows_of(folder, text, sources, loading.trust_remote_code) if sources else None
    by = f"masked by {counted(len(plans), 'plan')}" if plans else None
    against = f"against {teacher or 'the whole model'}" if teacher or plans else None
    shape = None if rows is None else shape_of(rows)
    announce("evaluating", model, by, against, where(folder, loading), shape, _more(tasks))
    given, prompts = _read(rows, sources, generating)
    student = loading.load(folder)
    reference = loading.load(original) if original else None
    trials = Trials(student, plans, reference)
    found: Found = {name: {} for name in trials.variants}
    if rows is not None:
        with reported("evaluating", lambda: rows.expected, "tokens") as advance:
            found = _measured(student, given, reference, plans, advance)
    if prompts:
        trials.generate(found, prompts, generating)
    if tasks is not None:
        tokenizer = load_tokenizer(folder, trust_remote_code=loading.trust_remote_code)
        trials.ask(found, tasks, tokenizer, text.batch_size)
    if card:
        told = {
            "results": found[""],
            "against": _name(teacher),
            "text": None if rows is None else rows.describe(),
            "generation": generating.describe() if prompts else None,
            "tasks": tasks.describe() if tasks else None,
            "command": shlex.join(["reap", *sys.argv[1:]]),
        }
        record_evaluation(folder, told)
    if json:
        print_json(found if plans else found[""])
    else:
        _print(folder, found)
    for note in rows.notes() if rows is not None else ():
        typer.echo(note, err=json)


def _check_asked(
    text: EvaluatedText, asking: TaskOptions, plans: dict[str, Plan], card: bool
) -> None:
    if not text.data and asking.tasks is None:
        raise ReapError("nothing to evaluate on: give --data, a text, or --tasks")
    if card and plans:
        raise ReapError("--card is of a pruned folder as it is: leave out --plan")


def _more(tasks: Tasks | None) -> str | None:
    return f"tasks {', '.join(tasks.names)}" if tasks else None


def _name(teacher: str | None) -> str | None:
    """A hub id as it is, of a folder the last part."""
    return Path(teacher).resolve().name if teacher and Path(teacher).is_dir() else teacher


def _read(
    rows: Batches | None, sources: list[Source], generating: GenerateOptions
) -> tuple[Iterable[Batch], dict[str, Tensor]]:
    """The batches, and prompts of them where these are asked for; then all are held."""
    from reap.runs.generation import prompts_of

    if rows is None:
        return [], {}
    read_on(rows, sources)
    if generating.generate is None:
        return rows, {}
    given = list(rows)
    return given, prompts_of(given, generating.generate, generating.prompt_tokens)


def _measured(
    student: Any,
    given: Iterable[Batch],
    teacher: Any | None,
    plans: dict[str, Plan],
    advance: Callable[[int], None],
) -> Found:
    from reap.runs.evaluation import evaluate as run

    if plans:
        results = run(student, given, teacher=teacher, plans=plans, progress=advance)
    else:
        results = {"": run(student, given, teacher=teacher, progress=advance)}
    return {
        name: {domain: result.to_json() for domain, result in of.items()}
        for name, of in results.items()
    }


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


def _print(folder: Path, found: Found) -> None:
    from reap.checkpoint.evaluations import measures_of, with_error

    if any("loss" in row for results in found.values() for row in results.values()):
        print_table(f"{folder} (nats per token)", *_table(found))
    texts = [
        [plan, domain, who, *_texts(row[key])]
        for plan, results in found.items()
        for key, who in (("teacher_generation", "original"), ("generation", "this"))
        for domain, row in results.items()
        if key in row
    ]
    if texts:
        columns = ["plan", "domain", "model", "texts", "loop", "end", "at limit", "4-grams"]
        _named("generated texts (share, 95% interval)", columns, texts)
    answers = [
        [plan, task, measure, *(with_error(row[key].get(task, {}), measure) for key in keys)]
        for plan, results in found.items()
        for row in [results.get("total", {})]
        for keys in [[key for key in ("teacher_tasks", "tasks") if key in row]]
        for task, measures in row.get("tasks", {}).items()
        for measure in measures_of(measures)
    ]
    if answers:
        columns = ["plan", "task", "measure", *["original"] * (len(answers[0]) > 4), "this"]
        _named("tasks", columns, answers)


def _named(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table without the column of plans where there are none."""
    start = 0 if any(row[0] for row in rows) else 1
    print_table(title, columns[start:], [row[start:] for row in rows])


def _texts(one: dict[str, Any]) -> list[str]:
    def share(name: str) -> str:
        told = one[f"{name}_share"]
        return f"{told['share']:.0%} ({told['low']:.0%}-{told['high']:.0%})"

    return [str(one["texts"]), *map(share, ("looped", "ended", "at_limit"))] + [
        f"{one['distinct']:.0%}"
    ]


def _table(found: Found) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, of results by plan ("" without); 80 columns where names are short."""
    columns, table = ["domain", "tokens", "loss", "perplexity"], []
    named = list(found) != [""]
    compared = any("kl" in r for results in found.values() for r in results.values())
    for plan, results in found.items():
        for domain, r in results.items():
            row = [domain, f"{r['tokens']:,}", f"{r['loss']:.4f}", f"{r['perplexity']:.3f}"]
            if compared:
                row += [f"{r['teacher_loss']:.4f}", f"{r['kl']:.4f}", f"{r['agreement']:.1%}"]
            table.append([plan, *row] if named else row)
    if compared:
        columns += ["teacher's loss", "KL", "top-1"]
    return (["plan", *columns] if named else columns), table
