"""What becomes of each tensor of a checkpoint when experts are merged: an edit whose bytes are
pieces of old files and of a file of means, which is written first."""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from reap.checkpoint.blocks import Block, find_blocks, resolve
from reap.checkpoint.operation import own_tensors
from reap.checkpoint.removal import MODALITIES
from reap.checkpoint.surgery import ROUTER, SHARED, STACKED, Edit
from reap.errors import ReapError
from reap.files.folder import Folder
from reap.files.safefile import Header, Tensor, open_unchanged, write_all
from reap.merging.averaging import WIDE, average
from reap.merging.mergeplan import Group, Merge
from reap.model.stored import DTYPES

CHUNK = 1 << 22  # bytes of each expert that are averaged at a time
READ = 4 << 20  # bytes that are copied at a time


@dataclass(frozen=True)
class Piece:
    """Bytes of a file; `version` tells it from what may stand in its place later."""

    path: Path
    version: tuple[int, ...] | None
    start: int
    length: int


@dataclass(frozen=True)
class Blend:
    """A quantity of experts that become one: each one's bytes, and their shares."""

    dtype: str
    parts: tuple[Piece, ...]
    shares: tuple[float, ...]

    @property
    def length(self) -> int:
        return self.parts[0].length


@dataclass(frozen=True)
class Blending:
    """`blends` in the order in which their means lie in one file; old tensor name -> its pieces, a
    number standing for that blend's mean."""

    blends: tuple[Blend, ...]
    tensors: Mapping[str, tuple[Piece | int, ...]]

    @property
    def size(self) -> int:
        """Bytes of all means."""
        return sum(blend.length for blend in self.blends)


def blending_of(folder: Folder, merge: Merge) -> Blending:
    """ReapError when the folder is not a model with experts, or holds them quantised or in
    different shapes, or does not fit the merge."""
    stored = {
        name: (shard, tensor)
        for shard in folder.shards
        for name, tensor in own_tensors(folder, shard)
    }
    blocks = find_blocks(stored)
    if not blocks:
        raise ReapError(f"{folder.path} has no experts that could be merged")
    served: dict[str, list[Group]] = {}
    names: dict[str, str] = {}
    for layer in merge.model.layers:
        block = resolve(layer.name, blocks)
        offset = _first_id(layer.name, layer.num_experts, block, stored)
        groups = [
            Group(tuple(i + offset for i in group.experts), group.weights)
            for group in merge.groups[layer.name]
        ]
        place = f"{block.module} {offset}"
        if place in names:
            if served[block.module] != groups:
                raise ReapError(
                    f"{names[place]} and {layer.name} share their weights: the merge must group "
                    "their experts alike"
                )
            continue
        names[place] = layer.name
        served.setdefault(block.module, []).extend(groups)
    blends: list[Blend] = []
    tensors: dict[str, tuple[Piece | int, ...]] = {}
    for module, groups in served.items():
        for entries in _quantities(blocks[module], groups, stored):
            _blend(entries, groups, blends, tensors)
    return Blending(tuple(blends), tensors)


@dataclass(frozen=True)
class _Entry:
    """One expert's part of the tensor `name`."""

    expert: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    piece: Piece


def _first_id(layer: str, experts: int, block: Block, stored: Mapping[str, object]) -> int:
    """The id in the file of a layer's expert 0: modalities are numbered one after another."""
    for row in MODALITIES:
        if f"{block.module}.{row.each[-1].router}" in stored:
            return row.index(layer) * experts
    return 0


def _quantities(
    block: Block, groups: list[Group], stored: Mapping[str, tuple[Header, Tensor]]
) -> Iterator[list[_Entry]]:
    """The experts' parts of every quantity that each of them has, in the order of the files."""
    total = max(i for group in groups for i in group.experts) + 1
    if block.ids:
        if not block.ids >= set(range(total)):
            raise ReapError(
                f"{block.module} has {len(block.ids)} experts, the merge speaks of {total}"
            )
        by_rest: dict[str, list[_Entry]] = {}
        for name, expert, rest in block.experts:
            shard, tensor = stored[name]
            piece = Piece(shard.path, shard.version, shard.data + tensor.start, tensor.nbytes)
            by_rest.setdefault(rest, []).append(
                _Entry(expert, name, tensor.shape, tensor.dtype, piece)
            )
        yield from by_rest.values()
    for name in sorted(block.fused):
        shard, tensor = stored[name]
        tail = name[len(block.module) + 1 :]
        if any(re.fullmatch(pattern, tail) for pattern, _ in ROUTER) or SHARED.fullmatch(tail):
            continue
        if math.prod(tensor.shape) <= 1:
            continue  # a scale that all experts share
        rows = tensor.shape[0]
        each = rows // total if STACKED.fullmatch(tail) else 1
        if rows != total * each or not rows:
            raise ReapError(
                f"{name!r} has shape {list(tensor.shape)}: its axis 0 must have one entry for each "
                f"of {total} experts"
            )
        size = tensor.nbytes // total
        yield [
            _Entry(
                i,
                name,
                (each, *tensor.shape[1:]),
                tensor.dtype,
                Piece(shard.path, shard.version, shard.data + tensor.start + i * size, size),
            )
            for i in range(total)
        ]


def _blend(
    entries: list[_Entry],
    groups: list[Group],
    blends: list[Blend],
    tensors: dict[str, tuple[Piece | int, ...]],
) -> None:
    """Adds one quantity: a mean for every group of several experts, and the tensors it is in."""
    by_expert = {entry.expert: entry for entry in entries}
    becomes: dict[int, Piece | int] = {e.expert: e.piece for e in entries}
    for group in groups:
        if len(group.experts) == 1:
            continue
        missing = [i for i in group.experts if i not in by_expert]
        members = [by_expert[i] for i in group.experts if i in by_expert]
        if not members:
            continue
        first = members[0]
        if missing:
            raise ReapError(
                f"expert {missing[0]} has nothing like {first.name!r}: experts that differ cannot "
                "be merged"
            )
        if DTYPES.get(first.dtype) not in WIDE:
            raise ReapError(
                f"{first.name!r} is of {first.dtype}: quantised weights have no mean, give a "
                "checkpoint in BF16, F16 or F32"
            )
        for other in members:
            if (other.shape, other.dtype) != (first.shape, first.dtype):
                raise ReapError(
                    f"{other.name!r} is {other.dtype} {list(other.shape)} and {first.name!r} "
                    f"{first.dtype} {list(first.shape)}: experts that differ cannot be merged"
                )
        becomes |= dict.fromkeys(group.experts, len(blends))
        blends.append(Blend(first.dtype, tuple(m.piece for m in members), group.shares))
    by_name: dict[str, list[Piece | int]] = {}
    for entry in entries:
        by_name.setdefault(entry.name, []).append(becomes[entry.expert])
    tensors |= {
        name: tuple(parts)
        for name, parts in by_name.items()
        if any(isinstance(part, int) for part in parts)
    }


def write_means(blending: Blending, path: Path, progress: Callable[[int], None]) -> None:
    """Writes the means to a new file. In memory there is a part of one quantity of one expert at a
    time, and of the sum. ReapError when what the disk then holds is something else."""
    crc = done = 0
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        for blend in blending.blends:
            for data in _mean(blend):
                write_all(fd, data)
                crc, done = zlib.crc32(data, crc), done + len(data)
                progress(len(data))
        os.fsync(fd)
    finally:
        os.close(fd)
    found = 0
    for data in _read([Piece(path, None, 0, done)]):
        found = zlib.crc32(data, found)
    if found != crc:
        raise ReapError(f"verification failed: {path} does not hold what was written to it")


def _mean(blend: Blend) -> Iterator[bytes]:
    dtype = DTYPES[blend.dtype]
    for start in range(0, blend.length, CHUNK):
        length = min(CHUNK, blend.length - start)
        cuts = (Piece(p.path, p.version, p.start + start, length) for p in blend.parts)
        parts = (torch.frombuffer(bytearray(_bytes(cut)), dtype=dtype) for cut in cuts)
        yield average(parts, blend.shares).view(torch.uint8).numpy().tobytes()


def _bytes(piece: Piece) -> bytes:
    return b"".join(_read([piece]))


def edits_of(blending: Blending, stored: Mapping[str, Tensor], means: Path) -> dict[str, Edit]:
    """Old name -> edit, for every tensor that changes. Each reads the file of means when asked."""
    ends = [0]
    for blend in blending.blends:
        ends.append(ends[-1] + blend.length)
    places = [Piece(means, None, start, end - start) for start, end in pairwise(ends)]
    return {
        name: Edit(
            name,
            stored[name].shape,
            made=_Reader(tuple(places[p] if isinstance(p, int) else p for p in parts)),
        )
        for name, parts in blending.tensors.items()
    }


@dataclass(frozen=True)
class _Reader:
    pieces: tuple[Piece, ...]

    def __call__(self) -> Iterator[bytes]:
        return _read(self.pieces)


def _read(pieces: Iterable[Piece]) -> Iterator[bytes]:
    """The bytes of the pieces one after another. ReapError for a file that changed."""
    for piece in pieces:
        with open_unchanged(piece.path, piece.version) as fd:
            for start in range(piece.start, piece.start + piece.length, READ):
                wanted = min(READ, piece.start + piece.length - start)
                data = os.pread(fd, wanted, start)
                if len(data) != wanted:
                    raise ReapError(f"{piece.path} became shorter while it was read")
                yield data
