"""Files that are either whole or not there, and what they need of the system."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from reap.errors import ReapError

Buffer = bytes | bytearray | memoryview
_UNFINISHED = ".part"
NOREPLACE, EXCHANGE = 1, 2  # linux/fs.h: RENAME_NOREPLACE, RENAME_EXCHANGE
_AT_FDCWD = -100


def write_file(
    path: str | os.PathLike[str], content: bytes | Iterable[Buffer], *, overwrite: bool = False
) -> None:
    """Write `content`, whole or in pieces, to `path`: whole or not at all.

    The bytes go to a temporary file beside it, are synced, and then take its name; a crash leaves
    the old file or none. ReapError when `path` exists and `overwrite` is not set, also when it
    appears while writing, and when the system refuses (no such folder, disk full, failing sync).
    """
    path = Path(path)
    if not overwrite:
        _refuse_existing(path)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}{_UNFINISHED}"
    try:
        with open(temporary, "xb") as file:
            for piece in [content] if isinstance(content, bytes) else content:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, path)
        else:
            rename_new(temporary, path)
        sync(path.parent)
    except OSError as error:
        if isinstance(error, FileExistsError):
            _refuse_existing(path)
        raise ReapError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def discard_unfinished(path: Path) -> None:
    """Remove what killed writers of `path` left. The caller knows that none is at work."""
    start = f".{path.name}."
    for temporary in path.parent.glob(f"{glob.escape(start)}*{_UNFINISHED}"):
        # Not what is for a name that goes on behind a dot.
        if "." not in temporary.name.removeprefix(start).removesuffix(_UNFINISHED):
            with suppress(OSError):
                temporary.unlink()


def rename_new(source: Path, target: Path) -> None:
    """Rename; FileExistsError when there is a `target` already, even one that just appeared."""
    if not renameat2(source, target, NOREPLACE):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        os.rename(source, target)


def renameat2(source: Path, target: Path, flag: int) -> bool:
    """False where libc, kernel or file system do not know this flag."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    names = os.fsencode(source), os.fsencode(target)
    if call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(flag)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))


def sync(path: str | os.PathLike[str]) -> None:
    """A file, or the names in a folder, are on stable storage when this returns."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # network file systems that cannot sync a folder
            raise
    finally:
        os.close(fd)


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise ReapError(f"{path} exists: choose another name or pass overwrite=True")
