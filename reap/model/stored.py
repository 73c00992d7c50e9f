"""The tensors of a checkpoint, read by name into memory of our own: never mapped, so that what is
read is what is held, and a file that is cut short is an error and no signal."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from reap.errors import ReapError
from reap.files.safefile import Header, open_unchanged
from reap.files.safefile import Tensor as Entry

CHUNK = 16 << 20  # bytes; whoever waits for the end of the reading waits for one
ALIGNED = 64  # bytes

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


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

    def on_meta(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Their shapes and data types, without data."""
        entries = ((name, self._where[name][1]) for name in names)
        return {
            name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
            for name, entry in entries
        }

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors, in one piece of memory that is freed with the last of them. ReapError when a
        file is not what it was when its header was read."""
        places: dict[str, int] = {}
        size = 0
        for name in names:
            places[name] = size
            size += -(-self._where[name][1].nbytes // ALIGNED) * ALIGNED
        with torch.inference_mode(False):
            block = torch.empty(size, dtype=torch.uint8)
            by_path: dict[Path, list[str]] = {}
            for name in sorted(places, key=lambda name: self._where[name][1].start):
                by_path.setdefault(self._where[name][0].path, []).append(name)
            for path, own in by_path.items():
                with open_unchanged(path, self._where[own[0]][0].version) as fd:
                    for name in own:
                        self._fill(fd, block, places[name], name)
            return {name: self._view(block, places[name], name) for name in places}

    def _fill(self, fd: int, block: Tensor, place: int, name: str) -> None:
        shard, entry = self._where[name]
        memory = memoryview(block.numpy())
        done = 0
        while done < entry.nbytes and not self._stopped:
            end = place + min(entry.nbytes, done + CHUNK)
            got = os.preadv(fd, [memory[place + done : end]], shard.data + entry.start + done)
            if got == 0:
                raise ReapError(f"{shard.path} became shorter while it was read")
            done += got

    def _view(self, block: Tensor, place: int, name: str) -> Tensor:
        entry: Entry = self._where[name][1]
        return block[place : place + entry.nbytes].view(DTYPES[entry.dtype]).view(entry.shape)
