"""`reap combine`: statistics of several runs as one."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reap.app.arguments import Json, Overwrite
from reap.app.commands.calibration import save_statistics, tell_statistics
from reap.app.console import print_json, reports_errors
from reap.app.longruns import reported
from reap.errors import ReapError
from reap.files.outputs import STATISTICS, check_file

if TYPE_CHECKING:
    from reap.statistics.stats import Statistics


@reports_errors
def combine(
    stats: Annotated[
        list[str],
        typer.Argument(
            metavar="STATS...", help="files of one model; also a glob, or @FILE with one per line"
        ),
    ],
    out: Annotated[Path, typer.Option(help="the statistics file to write")],
    incomplete: Annotated[
        bool, typer.Option("--incomplete", help="also some of a run's shards, to add others later")
    ] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Add up statistics of a model: runs, shards or domains.

    The sums are exact: all shards of a run are as the file of the run in one process. One that is
    missing, given twice or of another run is refused before any file is added.
    """
    paths = _files(stats)
    check_file(out, STATISTICS, overwrite=overwrite, inputs=paths)
    from reap.statistics.joining import check_whole, numbers_of
    from reap.statistics.stats import Statistics
    from reap.statistics.statsfile import read_data
    from reap.text.counted import said

    data = {path: read_data(path) for path in paths}
    if len(data) < len(paths):
        twice = next(path for path in data if paths.count(path) > 1)
        raise ReapError(f"{twice} is given twice: give it once")
    check_whole(((str(path), entries) for path, entries in data.items()), missing=incomplete)
    shards = {path for path in paths if any(numbers_of(entry) for entry in data[path])}
    with reported("combining", lambda: len(paths), "files") as advance:
        total = Statistics.total(_loaded(paths, shards, advance))
    counted = sorted({said(entry.get("count")) for entry in total.data})
    notes = [f"not all count the same tokens: {'; '.join(counted)}"] if len(counted) > 1 else []
    saved = save_statistics(total, out, overwrite, notes)
    if json:
        print_json(saved)
    else:
        tell_statistics(saved)


def _loaded(
    paths: list[Path], shards: set[Path], advance: Callable[[int], None]
) -> Iterator[Statistics]:
    """The files, one at a time. ReapError for two with the same sums, which are the same tokens:
    but for shards, whose numbers tell, and of which several may be empty."""
    from reap.statistics.stats import Statistics

    seen: dict[str, Path] = {}
    for path in paths:
        loaded = Statistics.load(path)
        other = path if path in shards else seen.setdefault(loaded.digest(), path)
        if other is not path:
            raise ReapError(f"{other} and {path} hold the same statistics: give them once")
        yield loaded
        advance(1)


def _files(given: list[str]) -> list[Path]:
    """The files that arguments name. ReapError for a glob, or a list, of none."""
    found: list[Path] = []
    for name in given:
        if name.startswith("@") and not Path(name).exists():
            try:
                lines = Path(name[1:]).read_text().splitlines()
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or "it is no text"
                raise ReapError(f"cannot read the list {name[1:]}: {reason}") from None
            paths = [line.strip() for line in lines if line.strip()]
        elif glob.has_magic(name) and not Path(name).exists():
            paths = sorted(glob.glob(name, recursive=True))
        else:
            paths = [name]
        if not paths:
            raise ReapError(f"{name} names no file of statistics")
        found += map(Path, paths)
    return found
