"""The `reap` command: calibrate -> score -> plan -> prune -> evaluate, thin calls of the API."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from reap import versions
from reap.app import console
from reap.app.commands import (
    calibration,
    combination,
    compression,
    estimation,
    evaluation,
    information,
    machine,
    merges,
    plans,
    pruning,
    reporting,
    scores,
)

app = typer.Typer(
    help="Expert saliency of mixture-of-experts language models, and pruning by it.",
    cls=console.Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    # rich would triple the time of `--help`, and a traceback is for --debug.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def main(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    console.debug = debug
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where it is not UTF-8
    if version:
        typer.echo(versions.OWN)
        raise typer.Exit()


for command in (
    calibration.calibrate,
    estimation.estimate,
    scores.score,
    plans.plan,
    pruning.prune,
    pruning.verify,
    compression.compress,
    merges.group,
    merges.merge,
    merges.decompose,
    combination.combine,
    evaluation.evaluate,
    reporting.report,
    reporting.diff,
    information.info,
    machine.doctor,
    machine.demo,
):
    app.command()(command)
