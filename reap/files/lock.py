"""One process at a time writes an output."""

from __future__ import annotations

import fcntl
import os
import weakref
from contextlib import suppress
from pathlib import Path

from reap.errors import ReapError


class Lock:
    """Held from here to `release`, or the end of the process, however it ends. ReapError when
    another process, or another Lock, holds that of the same `path`.

    The lock is on a hidden file beside `path`, which is removed with it; one that a killed process
    left holds nobody off.
    """

    def __init__(self, path: Path) -> None:
        self._file = lock_file(path)
        self._fd = self._take(path)
        self.release = weakref.finalize(self, _release, self._file, self._fd, os.getpid())

    def _take(self, path: Path) -> int:
        while True:
            try:
                fd = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise ReapError(f"cannot write {self._file}: {error.strerror}") from error
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its last holder may have removed it since it was opened.
                if os.stat(self._file).st_ino == os.fstat(fd).st_ino:
                    os.truncate(fd, 0)
                    os.write(fd, str(os.getpid()).encode())
                    return fd
            except FileNotFoundError:
                pass
            except BlockingIOError:
                holder = os.pread(fd, 32, 0).decode(errors="replace")
                os.close(fd)
                raise ReapError(
                    f"{path} is being written by another run (process {holder or 'unknown'}): "
                    "wait for it, or choose another output"
                ) from None
            except OSError as error:
                os.close(fd)
                raise ReapError(f"cannot lock {self._file}: {error.strerror}") from error
            os.close(fd)


def lock_file(path: Path) -> Path:
    """The file that is there while a Lock of `path` is held."""
    return path.with_name(f".{path.name}.lock")


def _release(file: Path, fd: int, owner: int) -> None:
    if os.getpid() == owner:  # a fork has the lock of its parent, who still needs it
        with suppress(OSError):
            file.unlink()  # before it is unlocked: nobody can hold it meanwhile
    os.close(fd)
