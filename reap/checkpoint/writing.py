"""The files of a pruned folder: byte ranges of old shards, new headers and index, copies."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
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
    write_all,
)

WRITERS = 2  # shards written at a time
GATHER = 16 << 20  # bytes of a strided tensor held in memory at a time


def write_shards(
    folder: Folder, layout: Layout, stage: Path, progress: Callable[[int], None]
) -> None:
    """Writes the shards of `layout`, several at a time, and their index. `progress` is never called
    by two threads at once."""
    lock, stopped = threading.Lock(), threading.Event()

    def advance(n: int) -> None:
        with lock:
            if stopped.is_set():
                raise InterruptedError
            progress(n)

    headers = {shard.path: shard for shard in folder.shards}
    with ThreadPoolExecutor(WRITERS) as pool:
        jobs = [
            pool.submit(_write_shard, headers[path], parts, stage / path.name, advance)
            for path, parts in layout.items()
        ]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    if folder.index is not None:
        write_json(stage / INDEX, _index(folder.index, layout))


def _index(old: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    weight_map = {edit.name: path.name for path, parts in layout.items() for edit, _ in parts}
    metadata = dict(old.get("metadata") or {})
    parts = [part for shard in layout.values() for part in shard]
    metadata["total_size"] = sum(span(tensor.dtype, edit.shape) for edit, tensor in parts)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(math.prod(edit.shape) for edit, _ in parts)
    return {**old, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def _write_shard(
    shard: Header,
    parts: list[tuple[surgery.Edit, Tensor]],
    path: Path,
    progress: Callable[[int], None],
) -> None:
    with open_unchanged(shard.path, shard.version) as source, _create(path) as target:
        tensors = {edit.name: (tensor.dtype, edit.shape) for edit, tensor in parts}
        write_all(target, encode_header(tensors, shard.metadata))
        pending: list[tuple[int, int]] = []
        for edit, tensor in parts:
            ranges = _ranges(edit, tensor, shard.data)
            if ranges is not None:
                pending.extend(ranges)
                continue
            _copy(source, pending, target, progress)
            pending = []
            for block in _gathered(source, edit, tensor, shard.data):
                write_all(target, block)
                progress(len(block))
        _copy(source, pending, target, progress)
        os.fsync(target)  # here, so that the disk works while other shards are copied


def _copy(
    source: int, ranges: list[tuple[int, int]], target: int, progress: Callable[[int], None]
) -> None:
    for offset, length in merged(iter(ranges)):
        copy_range(source, offset, length, target, progress)


def _ranges(edit: surgery.Edit, tensor: Tensor, data: int) -> list[tuple[int, int]] | None:
    """The file ranges that make up the new tensor, or None when it must be gathered in memory."""
    start = data + tensor.start
    if edit.experts is not None or (edit.rows is not None and edit.outer > 1):
        return None
    if edit.rows is None:
        return [(start, tensor.nbytes)]
    row = tensor.nbytes // edit.length
    return [(start + i * row, row) for i in edit.rows]


def _gathered(source: int, edit: surgery.Edit, tensor: Tensor, data: int) -> Iterator[bytes]:
    start = data + tensor.start
    if edit.experts is not None:
        table = np.frombuffer(
            _pread(source, tensor.nbytes, start), dtype=f"<i{BITS[tensor.dtype] // 8}"
        )
        yield surgery.remapped(table.reshape(tensor.shape), edit.experts).tobytes()
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


def copy_others(folder: Folder, stage: Path, progress: Callable[[int], None]) -> None:
    for name in folder.others:
        target = stage / carried_as(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_unchanged(folder.read_from(name)) as source, _create(target) as fd:
            copy_range(source, 0, os.fstat(source).st_size, fd, progress)


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    # Half a surrogate pair, which JSON can hold and UTF-8 cannot, becomes an escape again.
    write(path, text.encode(errors="backslashreplace"))


def write(path: Path, data: bytes) -> None:
    with _create(path) as fd:
        write_all(fd, data)


@contextmanager
def _create(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        yield fd
    finally:
        os.close(fd)
