"""Files that are either whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from reap.errors import ReapError


def write_file(
    path: str | os.PathLike[str],
    content: bytes | Callable[[BinaryIO], object],
    *,
    overwrite: bool = False,
) -> None:
    """Write `content`, bytes or a function that writes them, to `path`: whole or not at all.

    The bytes go to a temporary file beside it, are synced, and then take its name; a crash leaves
    the old file or none. ReapError when `path` exists and `overwrite` is not set, also when it
    appears while writing, and when the system refuses (no such folder, disk full, failing sync).
    """
    path = Path(path)
    if not overwrite:
        _refuse_existing(path)
    try:
        handle, temporary = tempfile.mkstemp(".part", f".{path.name}.", path.parent)
    except OSError as error:
        raise _failed(path, error) from error
    try:
        with os.fdopen(handle, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # mkstemp's 0600 is for secrets
            os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)  # unlike a rename, refuses to replace
            os.unlink(temporary)
        sync_folder(path.parent)
    except FileExistsError:
        _discard(temporary)
        _refuse_existing(path)
        raise
    except OSError as error:
        _discard(temporary)
        raise _failed(path, error) from error
    except BaseException:
        _discard(temporary)
        raise


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Make the names in a folder survive a crash."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise ReapError(f"{path} exists: choose another name or pass --overwrite")


def _failed(path: Path, error: OSError) -> ReapError:
    return ReapError(f"cannot write {path}: {error.strerror or error}")


def _discard(temporary: str) -> None:
    try:
        os.unlink(temporary)
    except FileNotFoundError:
        pass


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
