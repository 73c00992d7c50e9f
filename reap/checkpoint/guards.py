"""What every new folder is checked for before it is written, and what it records of its files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from reap.checkpoint.writing import Check, checksum
from reap.errors import ReapError
from reap.files import atomic
from reap.files.folder import Folder
from reap.files.outputs import check_folder
from reap.files.publish import staged
from reap.files.units import sized
from reap.model.config import NeedsCodeError
from reap.model.identity import describe_folder, weights_fingerprint
from reap.model.info import ModelInfo

MARGIN = 16 << 20  # bytes of disk left free beside the output


def described(folder: Folder, model: ModelInfo) -> ModelInfo:
    """What the folder holds, in the way that matches `model` if one does."""
    try:
        return describe_folder(folder.path, like=model)
    except NeedsCodeError:
        # Names and shapes of its experts are checked without; this is what else its files tell.
        return replace(
            model,
            model_type=str(folder.config.get("model_type")),
            weights=weights_fingerprint(folder.path),
        )


def check_same_model(folder: Folder, model: ModelInfo, found: ModelInfo, what: str) -> None:
    """ReapError unless the folder, which holds `found`, is that of `what`, made for `model`."""
    different = model.difference(found, to_prune=True)
    if different:
        raise ReapError(f"the {what} was made for another model than {folder.path}: {different}")


def agreed(folder: Folder, model: ModelInfo, what: str, *, strict: bool) -> tuple[str, ...]:
    """How the folder is not quite what `what` was made from, such as its precision. ReapError where
    it is another model, and with `strict` for the first of these notes."""
    found = described(folder, model)
    check_same_model(folder, model, found, what)
    notes = tuple(model.notes(found))
    if strict and notes:
        raise ReapError(f"{folder.path} is not strictly what the {what} was made from: {notes[0]}")
    return notes


@contextmanager
def new_folder(
    out: Path, source: Folder, *, overwrite: bool, verify: Callable[[Path], None] | None = None
) -> Iterator[Path]:
    """A hidden folder that becomes `out` when it is whole and `verify` accepts it. ReapError where
    the disk refuses."""

    def accept(stage: Path) -> None:
        if verify is not None:
            verify(stage)
        # Again: it took a while, and somebody may have put something there.
        check_folder(out, overwrite=overwrite, inputs=[source.path])

    try:
        with staged(out, overwrite=overwrite, verify=accept) as stage:
            yield stage
    except OSError as error:
        raise ReapError(
            f"cannot write {out}: {error.strerror or error}; nothing was changed there"
        ) from error


def check_space(out: Path, needed: int) -> None:
    """ReapError unless so many bytes can be written beside `out`."""
    place = out.parent
    while not os.path.exists(place):
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed + MARGIN:
        raise ReapError(
            f"{out} needs {sized(needed + MARGIN)}, {sized(MARGIN)} of it to spare, but "
            f"{place} has {sized(free)} free (an old folder stays until the new one is whole)"
        )


def recorded_files(folder: Path, check: Check | None) -> dict[str, dict[str, int]]:
    """Bytes and, if checked, CRC-32 of the files in it: what `reap verify` holds them against, and
    what a later run for the same output may replace."""
    files: dict[str, dict[str, int]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        files[name] = {"bytes": path.stat().st_size}
        if check is not None:
            atomic.sync(path)
            _, files[name]["crc32"] = check.found.get(name) or checksum(path)
    return files
