"""A control group whose memory is limited, pages of files included: of version 1 or 2."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


class Group:
    """A folder of the kernel's. `command` is what runs a command in it."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        second = (folder / "memory.max").exists()
        self._peak = "memory.peak" if second else "memory.max_usage_in_bytes"
        (folder / ("memory.max" if second else "memory.limit_in_bytes")).write_text(str(limit))

    def command(self, command: list[str]) -> list[str]:
        enter = f'echo $$ > "{self.folder}/cgroup.procs" && exec "$@"'
        return ["sh", "-c", enter, "sh", *command]

    def peak(self) -> int | None:
        """The most that it had, of processes and files [bytes]."""
        with suppress(OSError):
            return int((self.folder / self._peak).read_text())
        return None


@contextmanager
def limited(limit: int) -> Iterator[Group | None]:
    """A new group inside of this process's own, removed at the end; None where none can be had."""
    for line in Path("/proc/self/cgroup").read_text().split():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = ROOT / "memory" if controllers else ROOT
        folder = root / path.strip("/") / f"reap-bench-{os.getpid()}"
        with suppress(OSError):
            folder.mkdir()
        try:
            group = Group(folder, limit)
        except OSError:  # no such folder, or no controller for memory in it
            with suppress(OSError):
                folder.rmdir()
            continue
        try:
            yield group
        finally:
            with suppress(OSError):
                folder.rmdir()
        return
    yield None
