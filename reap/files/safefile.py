"""Reading and writing safetensors files as byte ranges: headers are checked, tensor data is never
interpreted.

A safetensors file is eight bytes (the header's length, little endian), the header (a JSON object:
name -> dtype, shape, data_offsets) and the data. Files come from strangers, so everything a header
claims is bounded or checked before it is used.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import struct
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from reap.errors import ReapError

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_DEPTH = 100  # of JSON
LFS_POINTER = b"version https://git-lfs"  # how a pointer in place of a file begins
COPY_CHUNK = 64 << 20  # bytes; an interrupt is noticed between two chunks

# What copy_file_range answers where it does not work.
NOT_IN_KERNEL = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)

# Bits per element of every dtype that the format knows.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip


_FIELDS = {"dtype", "shape", "data_offsets"}


class Tensor(NamedTuple):
    """Where one tensor lies: `start` and `stop` are byte offsets into the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """A checked header: `tensors` in the order of the data, which begins at file offset `data`.

    `version` tells the file that was read from what may stand in its place later.
    """

    path: Path
    data: int
    version: tuple[int, ...]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def span(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor. ReapError when its elements do not fill whole bytes."""
    bits = math.prod(shape) * BITS[dtype]
    if bits % 8:
        raise ReapError(f"{math.prod(shape)} elements of {dtype} do not fill whole bytes")
    return bits // 8


def open_regular(path: Path) -> int:
    """A read-only descriptor of a regular file; a pipe or device would block or never end."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ReapError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ReapError(f"{path} is not a regular file")
    return fd


def version_of(fd: int) -> tuple[int, ...]:
    """What changes when a file is written to or another takes its name."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def open_unchanged(path: Path, version: tuple[int, ...] | None = None) -> Iterator[int]:
    """A descriptor of a regular file that is `version`, or as it is now, from here to the end of
    the block; else ReapError."""
    fd = open_regular(path)
    expected = version or version_of(fd)

    def check() -> None:
        if version_of(fd) != expected:
            raise ReapError(f"{path} changed while it was read: start again when it is whole")

    try:
        check()
        yield fd
        check()
    finally:
        os.close(fd)


class OpenFile:
    """A regular file that is read from later, a piece at a time, as it was when it was opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = open_regular(path)
        weakref.finalize(self, os.close, self._fd)
        self.version = version_of(self._fd)

    def read(self, offset: int, length: int) -> bytearray:
        """ReapError when the file was written to since, or is shorter."""
        data = bytearray(length)
        done = os.preadv(self._fd, [data], offset) if length else 0
        while 0 < done < length:
            more = os.preadv(self._fd, [memoryview(data)[done:]], offset + done)
            done = done + more if more else 0
        # Another file may have taken the name since: this one is as it was.
        if done < length or version_of(self._fd) != self.version:
            raise ReapError(f"{self.path} changed while it was read: start again when it is whole")
        return data


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object. ReapError for anything else: no object, a key twice, nesting, broken text."""
    value = _parse(text, what)
    if _depth(value) > MAX_DEPTH:  # before anything that works by recursion
        raise ReapError(f"{what} is not valid JSON: nested too deeply")
    return value


def _parse(text: bytes, what: str) -> dict[str, Any]:
    """The same, but that it may be nested as deep as the parser allows."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = Counter(name for name, _ in pairs)
            twice = next(name for name, count in names.items() if count > 1)
            raise ReapError(f"{what} names {twice!r} twice")
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except ReapError:
        raise
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ReapError(f"{what} is not valid JSON: {reason}") from error
    if not isinstance(value, dict):
        raise ReapError(f"{what} is a JSON {type(value).__name__}: it must be an object")
    return value


def _depth(value: Any) -> int:
    """How many objects and lists lie in one another; stops counting beyond MAX_DEPTH."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        depth += 1
        level = [
            item
            for container in level
            if isinstance(container, dict | list)
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, dict | list)
        ]
    return depth


def _check_is_here(start: bytes, path: Path) -> None:
    if start.startswith(LFS_POINTER):
        raise ReapError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder, "
            "or download it again"
        )


def check_is_here(path: Path) -> None:
    """ReapError for a Git LFS pointer in place of a file."""
    with open(open_regular(path), "rb") as file:
        _check_is_here(file.read(len(LFS_POINTER)), path)


def read_json(path: Path, limit: int = MAX_HEADER) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes."""
    fd = open_regular(path)
    with open(fd, "rb") as file:
        size = os.fstat(fd).st_size
        if size > limit:
            raise ReapError(f"{path} has {size} bytes: more than {limit} is not a sane JSON file")
        text = file.read()
    _check_is_here(text, path)
    return parse_json(text, str(path))


# Headers that somebody still holds: of 200,000 tensors one costs seconds and 100 MB to read.
_headers: weakref.WeakValueDictionary[tuple[Any, ...], Header] = weakref.WeakValueDictionary()
_reading = threading.Lock()


def read_header(path: Path) -> Header:
    """The header of a safetensors file, after checking every claim in it against the file's size.

    While one is held, that of the same unchanged file is not read again. ReapError when the file is
    not a safetensors file, is truncated, or its tensors overlap or leave gaps.
    """
    fd = open_regular(path)
    with open(fd, "rb") as file:
        key = path, version_of(fd)
        with _reading:
            found = _headers.get(key)
        if found is None:
            found = _read_header(path, file, key[1])
            with _reading:
                _headers[key] = found
    return found


def _read_header(path: Path, file: BinaryIO, version: tuple[int, ...]) -> Header:
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise ReapError(f"{path} is not a safetensors file: it has only {size} bytes")
    start = file.read(len(LFS_POINTER))
    _check_is_here(start, path)
    (length,) = struct.unpack("<Q", start[:8])
    file.seek(8)
    if length > MAX_HEADER:
        raise ReapError(f"{path} is not a safetensors file: it claims a header of {length} bytes")
    if length > size - 8:
        raise ReapError(
            f"{path} is truncated or no safetensors file: {length} bytes of header in {size}"
        )
    fields = _parse(file.read(length), f"the header of {path}")  # `_tensor` sees what is nested
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ReapError(f"the header of {path}: __metadata__ must map strings to strings")
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    found = [(name, _tensor(name, entry, path, shapes)) for name, entry in fields.items()]
    found.sort(key=lambda item: item[1][2:])
    end = 0
    for name, tensor in found:
        if tensor.start != end:
            fault = "overlaps the one before it" if tensor.start < end else "leaves a gap before it"
            raise ReapError(f"the header of {path}: tensor {name!r} {fault}")
        end = tensor.stop
    if end != size - 8 - length:
        fault = "is truncated" if end > size - 8 - length else "has bytes after its last tensor"
        raise ReapError(f"{path} {fault}: {size} bytes, its header speaks of {8 + length + end}")
    return Header(path, 8 + length, version, dict(found), metadata)


def _tensor(
    name: str, entry: Any, path: Path, shapes: dict[tuple[int, ...], tuple[int, ...]]
) -> Tensor:
    """A checked entry; equal `shapes` become one object."""

    def is_count(value: Any) -> bool:
        return type(value) is int and 0 <= value < 2**63

    def bad(what: str) -> ReapError:
        return ReapError(f"the header of {path}: tensor {name!r} {what}")

    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise bad("must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise bad(f"has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(map(is_count, shape)):
        raise bad("has a shape that is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise bad("has data_offsets that are not two non-negative integers")
    start, stop = offsets
    sizes = tuple(shape)
    bits = math.prod(sizes) * BITS[dtype]
    if (stop - start) * 8 != bits:
        raise bad(f"has {stop - start} bytes, its shape and dtype ask for {bits / 8:g}")
    return Tensor(sys.intern(dtype), shapes.setdefault(sizes, sizes), start, stop)


def encode_header(
    tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> bytes:
    """The bytes before the data for tensors (name -> dtype, shape) laid out in this order.

    The JSON is padded with spaces so that the data begins at a multiple of eight, as the library
    does.
    """
    fields: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + span(dtype, shape)
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ReapError(
            f"a header of {len(text)} bytes exceeds the limit of safetensors, {MAX_HEADER}"
        )
    return struct.pack("<Q", len(text)) + text


def merged(ranges: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(offset, length) ranges in the same order, neighbours joined."""
    start = end = -1
    for offset, length in ranges:
        if offset == end:
            end += length
            continue
        if end > start:
            yield start, end - start
        start, end = offset, offset + length
    if end > start:
        yield start, end - start


def write_all(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def copy_range(
    source: int, offset: int, length: int, target: int, progress: Callable[[int], None]
) -> None:
    """Appends source[offset : offset + length] to `target`, inside the kernel where it can."""
    in_kernel = True
    while length:
        chunk = min(length, COPY_CHUNK)
        done = _copied_in_kernel(source, offset, chunk, target) if in_kernel else 0
        in_kernel = done > 0
        if not in_kernel:
            block = os.pread(source, min(chunk, 4 << 20), offset)
            if not block:
                raise ReapError(
                    f"a file became shorter while it was read: {length} bytes are missing"
                )
            write_all(target, block)
            done = len(block)
        offset, length = offset + done, length - done
        progress(done)


def _copied_in_kernel(source: int, offset: int, length: int, target: int) -> int:
    """Bytes appended; 0 where it cannot be done between these files or on this kernel.

    Some file systems say so by an error, others by that number.
    """
    try:
        return os.copy_file_range(source, target, length, offset_src=offset)
    except OSError as error:
        if error.errno in NOT_IN_KERNEL:
            return 0
        raise
