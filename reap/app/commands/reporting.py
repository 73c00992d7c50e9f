"""`reap report` and `reap diff`: what statistics and plans say, and how two differ."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reap.app.arguments import Criterion, Json, Overwrite, Stats
from reap.app.console import print_json, reports_errors
from reap.files.units import sized


@reports_errors
def report(
    stats: Stats,
    plans: Annotated[
        list[Path] | None, typer.Argument(metavar="[PLAN]...", help="plans of the same model")
    ] = None,
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("report.html"),
    evaluation: Annotated[
        Path | None, typer.Option(help="what `reap evaluate --json` printed of the plans")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="also a folder with every figure as SVG and PNG")
    ] = None,
    ratio: Annotated[float, typer.Option(help="of the cut to show where no plan is given")] = 0.5,
    criterion: Criterion = "reap",
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write one HTML page of what statistics and plans say, which needs no network: scores and the
    cut, criteria and domains compared, how sure it is, pairs, the text, and what plans cost."""
    from reap.report.page import write_report

    written = write_report(
        stats,
        plans or [],
        out,
        criterion=criterion,
        ratio=str(ratio),
        evaluation=evaluation,
        figures=figures,
        overwrite=overwrite,
    )
    if json:
        print_json(
            {
                "out": str(written.path),
                "bytes": written.size,
                "figures": written.figures,
                "files": [str(path) for path in written.files],
                "findings": written.findings,
            }
        )
        return
    for finding in written.findings:
        typer.echo(finding)
    typer.echo(f"{written.path}: {sized(written.size)}, {len(written.figures)} figures")
