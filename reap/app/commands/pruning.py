"""`reap prune`: a plan applied to the files of a model."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reap.app.arguments import Json, Model, Overwrite, Revision, Verify
from reap.app.console import print_json, reports_errors
from reap.app.longruns import announce, reported
from reap.errors import ReapError
from reap.files.outputs import check_folder
from reap.files.units import sized

if TYPE_CHECKING:
    from reap.checkpoint.pruning import PruneReport
    from reap.planning.plan import Plan


@reports_errors
def prune(
    model: Model,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="a plan file")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the folder to write")],
    revision: Revision = None,
    overwrite: Overwrite = False,
    verify: Verify = True,
    allow_copy: Annotated[
        bool, typer.Option("--allow-copy", help="also by a plan that drops no expert")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="refuse another precision of the plan's model")
    ] = False,
    json: Json = False,
) -> None:
    """Write MODEL without the experts that PLAN drops.

    Straight from its files; tokenizer, chat template and generation settings come along.
    """
    check_folder(out, overwrite=overwrite, inputs=[model, plan])
    from reap.files.hub import resolve_model
    from reap.planning.plan import Plan

    chosen = Plan.load(plan)
    folder = resolve_model(model, revision)
    check_folder(out, overwrite=overwrite, inputs=[folder, plan])  # of a hub id, its cache
    options = {"overwrite": overwrite, "allow_copy": allow_copy, "strict": strict}
    report = write_pruned(model, folder, chosen, out, verify=verify, **options)
    if json:
        print_json(report.to_json())
    else:
        typer.echo(str(report))


def write_pruned(
    model: str, folder: Path, plan: Plan, out: Path, *, verify: bool, **options: bool
) -> PruneReport:
    """`reap.prune` of `model`, which is in `folder`, with this command in its record."""
    from reap.checkpoint.pruning import check_prune
    from reap.checkpoint.pruning import prune as run

    size = check_prune(folder, plan, out, **options)
    how = "read back and compared" if verify else "not verified"
    announce("pruning", model, f"{sized(size)} to write to {out}", how)
    with reported("pruning", lambda: size, "bytes") as advance:
        return run(
            folder,
            plan,
            out,
            verify=verify,
            command=shlex.join(["reap", *sys.argv[1:]]),
            progress=advance,
            **options,
        )


@reports_errors
def verify(
    folder: Annotated[str, typer.Argument(metavar="OUT", help="the folder of a pruned model")],
    source: Annotated[str | None, typer.Option(help="the model that it was pruned from")] = None,
    revision: Annotated[
        str | None, typer.Option(help="branch, tag or commit of OUT, where that is a hub id")
    ] = None,
    source_revision: Annotated[
        str | None, typer.Option(help="branch, tag or commit of --source, where that is a hub id")
    ] = None,
    json: Json = False,
) -> None:
    """Check a pruned model, and say what a server needs to know.

    It is read back and compared with --source, or with the checksums that were recorded.
    """
    from reap.checkpoint.verification import record_of
    from reap.checkpoint.verification import verify as run
    from reap.files.hub import resolve_model

    if source_revision is not None and source is None:
        raise ReapError("--source-revision is of --source: give that too")
    original = resolve_model(source, source_revision) if source else None
    path = resolve_model(folder, revision)
    record_of(path)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    against = f"against {source}" if source else "by its checksums"
    announce("verifying", folder, against, f"{sized(size)} to read")
    with reported("verifying", lambda: size, "bytes") as advance:
        found = run(path, original, progress=advance)
    if json:
        print_json(found.to_json())
    else:
        typer.echo(str(found))
    if found.problems:
        raise ReapError(f"{folder} does not load: {found.problems[0]}")
