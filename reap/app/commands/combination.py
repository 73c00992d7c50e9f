"""`reap combine`: statistics of several runs as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reap.app.arguments import (
    Json,
    Overwrite,
    save_statistics,
)
from reap.app.console import reports_errors
from reap.files.outputs import STATISTICS, check_file


@reports_errors
def combine(
    stats: Annotated[list[Path], typer.Argument(metavar="STATS...", help="files of one model")],
    out: Annotated[Path, typer.Option(help="the statistics file to write")],
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Add statistics of several runs, shards or domains of one model, exactly."""
    check_file(out, STATISTICS, overwrite=overwrite, inputs=stats)
    from reap.statistics.stats import Statistics

    total = Statistics.load(stats[0])
    for path in stats[1:]:
        total = total + Statistics.load(path)
    save_statistics(total, out, overwrite, json)
