"""The files of a new folder: byte ranges of old shards, new headers and index, copies."""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from reap.checkpoint import surgery
from reap.checkpoint.card import carried_as
from reap.checkpoint.operation import Layout
from reap.errors import ReapError
from reap.files.folder import INDEX, Folder
from reap.files.safefile import (
    BITS,
    Header,
    Tensor,
    copy_range,
    encode_header,
    merged,
    open_unchanged,
    span,
    version_of,
    write_all,
)
from reap.model.routers import remapped

Parts = list[tuple[surgery.Edit, Tensor]]  # of one shard, in the order of the data

WRITERS = 2  # shards written at a time
READ = 4 << 20  # bytes that are read back at a time
GATHER = 16 << 20  # bytes of a strided tensor held in memory at a time


@dataclass
class Check:
    """What was read back: bytes and CRC-32 of each file by its name, and the seconds it took."""

    found: dict[str, tuple[int, int]] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)  # of several threads at once


def write_shards(
    folder: Folder,
    layout: Layout,
    stage: Path,
    progress: Callable[[int], None],
    check: Check | None = None,
) -> None:
    """Writes the shards of `layout`, several at a time, and their index. `progress` is never called
    by two threads at once.

    With `check`, each shard is read back once it is on the disk and held against the original.
    """

    def write_one(shard: Header, parts: Parts, advance: Callable[[int], None]) -> None:
        path = stage / shard.path.name
        _write_shard(shard, parts, path, advance)
        if check is not None:
            check_shard(shard, parts, path, check, advance)

    _over_shards(folder, layout, write_one, progress)
    if folder.index is not None:
        write_json(stage / INDEX, _index(folder.index, layout))


def check_shards(
    folder: Folder, layout: Layout, written: Path, check: Check, progress: Callable[[int], None]
) -> None:
    """Holds the shards in `written` against those that `folder` and `layout` make. `progress` hears
    of the bytes read."""

    def check_one(shard: Header, parts: Parts, advance: Callable[[int], None]) -> None:
        check_shard(shard, parts, written / shard.path.name, check, advance, counts=True)

    _over_shards(folder, layout, check_one, progress)


def _over_shards(
    folder: Folder,
    layout: Layout,
    act: Callable[[Header, Parts, Callable[[int], None]], None],
    progress: Callable[[int], None],
) -> None:
    lock, stopped = threading.Lock(), threading.Event()

    def advance(n: int) -> None:
        with lock:
            if stopped.is_set():
                raise InterruptedError
            progress(n)

    headers = {shard.path: shard for shard in folder.shards}
    with ThreadPoolExecutor(WRITERS) as pool:
        jobs = [pool.submit(act, headers[path], parts, advance) for path, parts in layout.items()]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def _index(old: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    weight_map = {edit.name: path.name for path, parts in layout.items() for edit, _ in parts}
    metadata = dict(old.get("metadata") or {})
    parts = [part for shard in layout.values() for part in shard]
    metadata["total_size"] = sum(span(tensor.dtype, edit.shape) for edit, tensor in parts)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(math.prod(edit.shape) for edit, _ in parts)
    return {**old, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def _write_shard(shard: Header, parts: Parts, path: Path, progress: Callable[[int], None]) -> None:
    with open_unchanged(shard.path, shard.version) as source, _create(path) as target:
        write_all(target, _header(shard, parts))
        for piece in _pieces(source, shard, parts):
            if isinstance(piece, bytes):
                write_all(target, piece)
                progress(len(piece))
            else:
                copy_range(source, *piece, target, progress)
        os.fsync(target)  # here, so that the disk works while other shards are copied


def check_shard(
    shard: Header,
    parts: Parts,
    path: Path,
    check: Check,
    progress: Callable[[int], None],
    *,
    counts: bool = False,
) -> None:
    """ReapError where the file at `path` is not byte for byte what `shard` and `parts` make."""
    started = time.monotonic()
    with open_unchanged(shard.path, shard.version) as source:
        pieces = itertools.chain([_header(shard, parts)], _pieces(source, shard, parts))
        found = _held_against(path, source, pieces, lambda n: progress(n if counts else 0))
    check.found[path.name] = found
    check.times.append(time.monotonic() - started)


def _held_against(
    path: Path,
    source: int,
    pieces: Iterable[bytes | tuple[int, int]],
    progress: Callable[[int], None],
) -> tuple[int, int]:
    """Bytes and CRC-32 of the file at `path`. ReapError where it is not made of these pieces."""
    done = crc = 0
    with from_disk(path) as fd:
        for block in _blocks(source, pieces):
            found = os.pread(fd, len(block), done)
            if found != block:
                at = done + next(
                    (i for i, (a, b) in enumerate(zip(found, block, strict=False)) if a != b),
                    len(found),
                )
                raise ReapError(
                    f"verification failed: {path.name} differs from the original from byte {at} "
                    "on: the disk or its connection is at fault, or the file was changed"
                )
            crc = zlib.crc32(found, crc)
            done += len(found)
            progress(len(found))
        if os.fstat(fd).st_size != done:
            raise ReapError(f"verification failed: {path.name} has bytes after byte {done}")
    return done, crc


def _blocks(source: int, pieces: Iterable[bytes | tuple[int, int]]) -> Iterator[bytes]:
    for piece in pieces:
        if isinstance(piece, bytes):
            for start in range(0, len(piece), READ):
                yield piece[start : start + READ]
            continue
        offset, length = piece
        for start in range(offset, offset + length, READ):
            yield _pread(source, min(READ, offset + length - start), start)


def checksum(path: Path, progress: Callable[[int], None] = lambda n: None) -> tuple[int, int]:
    """Bytes and CRC-32 of a file, from the disk where the system allows."""
    done = crc = 0
    with from_disk(path) as fd:
        while block := os.pread(fd, READ, done):
            crc = zlib.crc32(block, crc)
            done += len(block)
            progress(len(block))
    return done, crc


@contextmanager
def from_disk(path: Path) -> Iterator[int]:
    """A descriptor of a regular file whose pages in memory, which may be better than the disk's,
    are dropped where the system does that. Only what is synced can be."""
    with open_unchanged(path) as fd:
        with suppress(OSError, AttributeError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        yield fd


def _header(shard: Header, parts: Parts) -> bytes:
    tensors = {edit.name: (tensor.dtype, edit.shape) for edit, tensor in parts}
    return encode_header(tensors, shard.metadata)


def _pieces(source: int, shard: Header, parts: Parts) -> Iterator[bytes | tuple[int, int]]:
    """The data of a new shard in order: bytes as they are, or (offset, length) in the old one."""
    pending: list[tuple[int, int]] = []
    for edit, tensor in parts:
        ranges = _ranges(edit, tensor, shard.data)
        if ranges is not None:
            pending.extend(ranges)
            continue
        yield from merged(iter(pending))
        pending = []
        yield from _gathered(source, edit, tensor, shard.data)
    yield from merged(iter(pending))


def _ranges(edit: surgery.Edit, tensor: Tensor, data: int) -> list[tuple[int, int]] | None:
    """The file ranges that make up the new tensor, or None when it must be gathered in memory."""
    start = data + tensor.start
    if edit.made is not None or edit.experts is not None:
        return None
    if edit.rows is not None and edit.outer > 1:
        return None
    if edit.rows is None:
        return [(start, tensor.nbytes)]
    row = tensor.nbytes // edit.length
    return [(start + i * row, row) for i in edit.rows]


def _gathered(source: int, edit: surgery.Edit, tensor: Tensor, data: int) -> Iterator[bytes]:
    if edit.made is not None:
        yield from edit.made()
        return
    start = data + tensor.start
    if edit.experts is not None:
        table = np.frombuffer(
            _pread(source, tensor.nbytes, start), dtype=f"<i{BITS[tensor.dtype] // 8}"
        )
        yield remapped(table.reshape(tensor.shape), edit.experts).tobytes()
        return
    assert edit.rows is not None
    wide = tensor.nbytes // edit.outer
    step = max(1, GATHER // max(1, wide))
    for first in range(0, edit.outer, step):
        count = min(step, edit.outer - first)
        raw = np.frombuffer(_pread(source, count * wide, start + first * wide), dtype=np.uint8)
        yield raw.reshape(count, edit.length, -1)[:, list(edit.rows)].tobytes()


def _pread(fd: int, length: int, offset: int) -> bytes:
    data = os.pread(fd, length, offset)
    if len(data) != length:
        raise ReapError(
            f"a file became shorter while it was read: wanted {length} bytes, got {len(data)}"
        )
    return data


def copy_others(
    folder: Folder, stage: Path, progress: Callable[[int], None], check: Check | None = None
) -> None:
    """Copies the other files, and with `check` reads them back."""
    for name in folder.others:
        target = stage / carried_as(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        path = folder.read_from(name)
        with open_unchanged(path) as source, _create(target) as fd:
            size, version = os.fstat(source).st_size, version_of(source)
            copy_range(source, 0, size, fd, progress)
            if check is not None:
                os.fsync(fd)
        if check is None:
            continue
        started = time.monotonic()
        with open_unchanged(path, version) as source:
            whole = _held_against(target, source, [(0, size)], lambda n: progress(0))
        check.found[carried_as(name)] = whole
        check.times.append(time.monotonic() - started)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    with _create(path) as fd:
        # Half a surrogate pair, which JSON and names of files can hold and UTF-8 cannot, becomes
        # an escape.
        write_all(fd, text.encode(errors="backslashreplace"))


@contextmanager
def _create(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        yield fd
    finally:
        os.close(fd)
