"""`reap prune`: a plan applied to the files of a model."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from reap.app.arguments import (
    Json,
    Model,
    Overwrite,
    refuse_existing,
)
from reap.app.console import print_json, progress, reports_errors


@reports_errors
def prune(
    model: Model,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="a plan file")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the folder to write")],
    overwrite: Overwrite = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="refuse another precision of the plan's model")
    ] = False,
    json: Json = False,
) -> None:
    """Write MODEL without the experts that PLAN drops, straight from its files."""
    refuse_existing(out, overwrite, folder=True)
    from reap.checkpoint.pruning import prune as run
    from reap.checkpoint.pruning import pruned_size
    from reap.files.hub import resolve_model
    from reap.planning.plan import Plan

    chosen = Plan.load(plan)
    folder = resolve_model(model)
    command = shlex.join(["reap", *sys.argv[1:]])
    size = pruned_size(folder, chosen)
    with progress("pruning", lambda: size, "bytes") as advance:
        report = run(
            folder,
            chosen,
            out,
            overwrite=overwrite,
            strict=strict,
            command=command,
            progress=advance,
        )
    if json:
        print_json(report.to_json())
        return
    typer.echo(str(report))
