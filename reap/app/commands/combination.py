"""`reap combine`: statistics of several runs as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reap.app.arguments import Json, Overwrite
from reap.app.commands.calibration import save_statistics, tell_statistics
from reap.app.console import print_json, reports_errors
from reap.errors import ReapError
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
    from reap.text.counted import said

    total = Statistics.load(stats[0])
    seen = {total.digest(): stats[0]}
    for path in stats[1:]:
        more = Statistics.load(path)
        other = seen.setdefault(more.digest(), path)
        if other is not path:
            raise ReapError(f"{other} and {path} hold the same statistics: give them once")
        total = total + more
    counted = sorted({said(entry.get("count")) for entry in total.data})
    notes = [f"not all count the same tokens: {'; '.join(counted)}"] if len(counted) > 1 else []
    saved = save_statistics(total, out, overwrite, notes)
    if json:
        print_json(saved)
    else:
        tell_statistics(saved)
