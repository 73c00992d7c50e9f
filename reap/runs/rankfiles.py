"""The files that the processes of one run keep beside its output while they are at work."""

from __future__ import annotations

import glob
import re
import time
from pathlib import Path

from reap.errors import ReapError
from reap.files.lock import lock_file
from reap.statistics import statsfile
from reap.statistics.joining import check_whole
from reap.statistics.stats import Statistics

PARTIAL = ".partial.safetensors"  # behind the output's name
_SEEN_SECONDS = 10.0  # until a network file system shows a file of another machine


def rank_file(out: Path, rank: int = 0, size: int = 1) -> Path:
    """That of rank `rank` of `size`, or of a process that is alone."""
    number = "" if size == 1 else f".rank-{rank}-of-{size}"
    return out.with_name(f"{out.name}{number}{PARTIAL}")


def refuse_others(out: Path, size: int) -> None:
    """ReapError when a run of another number of processes left such a file: its work would be done
    again."""
    found = out.parent.glob(f"{glob.escape(out.name)}.rank-*-of-*{PARTIAL}")
    left = {path: int(path.name.removesuffix(PARTIAL).rpartition("-")[2]) for path in found
            if re.search(r"\.rank-\d+-of-\d+$", path.name.removesuffix(PARTIAL))}  # fmt: skip
    if rank_file(out).exists():
        left[rank_file(out)] = 1
    for path, its_size in sorted(left.items()):
        if its_size != size:
            raise ReapError(
                f"{path} holds what an earlier run of {_processes(its_size)} measured, and this "
                f"one is of {_processes(size)}: start as many to go on, or remove the file"
            )


def check_shared(out: Path, size: int) -> None:
    """ReapError unless the ranks, which hold the locks of their files, have them where `out` is for
    this process too."""
    ends = time.monotonic() + _SEEN_SECONDS
    for rank in range(size):
        while not lock_file(rank_file(out, rank, size)).exists():
            if time.monotonic() > ends:
                raise ReapError(
                    f"rank {rank} of {size} writes to another folder {out.absolute().parent}, on "
                    "its own machine: choose an output in a folder that all share, or use --shard"
                )
            time.sleep(0.1)


def sum_of_ranks(out: Path, size: int) -> Statistics:
    """What all ranks measured, from their files, which are complete. ReapError when they are not of
    one run: of other text, say."""
    paths = [rank_file(out, rank, size) for rank in range(size)]
    data = {path: statsfile.read_data(path) for path in paths}
    check_whole((str(path), [_complete(entry) for entry in data[path]]) for path in paths)

    def load(path: Path) -> Statistics:
        stats = Statistics.load(path)
        stats.data = [_complete(entry) for entry in stats.data]
        return stats

    return Statistics.total(map(load, paths))


def _complete(entry: dict) -> dict:
    return {name: value for name, value in entry.items() if name != "partial"}


def _processes(count: int) -> str:
    return "one process" if count == 1 else f"{count} processes"
