"""Replacing a folder in one step: whatever happens, the old one or the new one is there, whole."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from reap.errors import ReapError
from reap.files import atomic


@contextmanager
def staged(
    out: Path, *, overwrite: bool, verify: Callable[[Path], None] = lambda _: None
) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its place when the block ends, and vanishes when it
    raises.

    Before it moves, `verify(folder)` may object and every file and folder in it is synced. A killed
    process leaves at most the hidden folder `.<name>.reap-*`, which the next run for the same `out`
    removes: each is locked by its writer, and the kernel drops the lock when the writer dies.
    """
    with _parents(out):
        _recover(out)
        stage, lock = _new_stage(out)
        try:
            yield stage
            verify(stage)
            sync_tree(stage)
            _move_into_place(stage, out, overwrite)
        finally:
            # The new folder (on failure) or the old one (after an exchange); nothing after a plain
            # rename.
            _remove(stage)
            os.close(lock)


def _remove(folder: Path) -> None:
    """Wholly, also when a signal comes in between."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _parents(out: Path) -> Iterator[None]:
    """The folders above `out`, those that were missing only when the block does not raise."""
    missing = [folder for folder in out.parents if not os.path.lexists(folder)]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            atomic.sync(folder.parent)
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):  # never made, or another program has put something in it
                folder.rmdir()
        raise


def sync_tree(folder: Path) -> None:
    """Every file and folder below and including `folder` is on stable storage when this returns."""
    for parent, _, files in os.walk(folder):
        for name in files:
            atomic.sync(Path(parent, name))
        atomic.sync(parent)


def _move_into_place(stage: Path, out: Path, overwrite: bool) -> None:
    replacing = overwrite and os.path.lexists(out)
    if replacing:
        _exchange(stage, out)
    else:
        atomic.rename_new(stage, out)
    try:
        atomic.sync(out.parent)
    except BaseException:
        # Not known to be durable: report a failure, and leave what a failure leaves.
        if replacing:
            _exchange(stage, out)
        else:
            os.rename(out, stage)
        raise


def _exchange(stage: Path, out: Path) -> None:
    if atomic.renameat2(stage, out, atomic.EXCHANGE):
        return
    # Three renames where the file system has no exchange. Killed in between, `_recover` puts the
    # old one back.
    aside = out.with_name(f".{out.name}.reap-aside")
    os.rename(out, aside)
    try:
        os.rename(stage, out)
    except BaseException:
        os.rename(aside, out)
        raise
    os.rename(aside, stage)


def _new_stage(out: Path) -> tuple[Path, int]:
    while True:
        stage = out.with_name(f".{out.name}.reap-{secrets.token_hex(4)}")
        os.mkdir(stage)
        try:
            lock = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # another run took it for a stale one before we could lock it
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.stat(stage), os.fstat(lock)):
                return stage, lock
        except FileNotFoundError:
            pass
        os.close(lock)


def _recover(out: Path) -> None:
    """Removes what killed runs for `out` left; puts back an old folder that was moved aside."""
    mine = re.compile(re.escape(f".{out.name}.reap-") + r"([0-9a-f]{8}|aside)")
    for path in sorted(p for p in out.parent.iterdir() if mine.fullmatch(p.name)):
        if path.is_symlink() or not path.is_dir():
            continue
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.name.endswith(".reap-aside") and not os.path.lexists(out):
                os.rename(path, out)
            else:
                shutil.rmtree(path)
        except BlockingIOError:
            pass  # a run that is alive
        except OSError as error:
            raise ReapError(
                f"cannot remove {path}, left by a killed run: {error.strerror}"
            ) from error
        finally:
            os.close(fd)
