"""The tensors of a checkpoint, read by name into memory of their own: not mapped, so that what is
read is what is held, and a file that is cut short is an error and no signal."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reap.errors import ReapError
from reap.files.safefile import Header, open_unchanged

CHUNK = 16 << 20  # bytes; whoever waits for the end of the reading waits for one
LARGE = 1 << 20  # bytes, from which a tensor's memory is the system's again once it is not used
FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


class Once:
    """A tensor that is handed out once and then forgotten, as safetensors' slices are used."""

    def __init__(self, tensor: Tensor, dtype: str) -> None:
        self._tensor: Tensor | None = tensor
        self._dtype, self._shape = dtype, list(tensor.shape)

    def __getitem__(self, whole: Any) -> Tensor:
        tensor, self._tensor = self._tensor, None
        assert tensor is not None and whole is Ellipsis
        return tensor

    def get_dtype(self) -> str:
        return self._dtype

    def get_shape(self) -> list[int]:
        return self._shape


class Stored:
    """The tensors in `shards`; of two with one name, the later."""

    def __init__(self, shards: Iterable[Header]) -> None:
        self._where = {
            name: (shard, entry) for shard in shards for name, entry in shard.tensors.items()
        }
        self._stopped = False
        for name, (shard, entry) in self._where.items():
            if entry.dtype not in DTYPES:
                raise ReapError(
                    f"tensor {name!r} of {shard.path} is of {entry.dtype}, which cannot be read"
                )

    def stop(self) -> None:
        """Whoever is reading in another thread gives up."""
        self._stopped = True

    def nbytes(self, names: Iterable[str]) -> int:
        return sum(self._where[name][1].nbytes for name in names)

    def on_meta(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Their shapes and data types, without data."""
        entries = ((name, self._where[name][1]) for name in names)
        return {
            name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
            for name, entry in entries
        }

    def read(self, names: Iterable[str]) -> dict[str, Once]:
        """The tensors, from the files in their order. ReapError when a file is not what it was when
        its header was read."""
        by_path: dict[Path, list[str]] = {}
        for name in names:
            by_path.setdefault(self._where[name][0].path, []).append(name)
        found = {}
        for path, own in by_path.items():
            own.sort(key=lambda name: self._where[name][1].start)
            with open_unchanged(path, self._where[own[0]][0].version) as fd:
                for name in own:  # all at once, which a disk does faster than one after the other
                    shard, entry = self._where[name]
                    start = shard.data + entry.start
                    os.posix_fadvise(fd, start, entry.nbytes, os.POSIX_FADV_WILLNEED)
                for name in own:
                    found[name] = self._read(fd, name)
        return found

    def _read(self, fd: int, name: str) -> Once:
        shard, entry = self._where[name]
        with torch.inference_mode(False):
            if entry.nbytes < LARGE:
                raw = torch.empty(entry.nbytes, dtype=torch.uint8)
            else:
                raw = torch.frombuffer(mmap.mmap(-1, entry.nbytes, FLAGS), dtype=torch.uint8)
            memory, done = memoryview(raw.numpy()), 0
            while done < entry.nbytes and not self._stopped:
                into = memory[done : min(entry.nbytes, done + CHUNK)]
                got = os.preadv(fd, [into], shard.data + entry.start + done)
                if got == 0:
                    raise ReapError(f"{shard.path} became shorter while it was read")
                done += got
            return Once(raw.view(DTYPES[entry.dtype]).view(entry.shape), entry.dtype)
