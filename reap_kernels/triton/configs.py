"""Tile sizes per architecture, as data; the tests compile each of them offline for its chips.

Large tiles reuse what they read and feed the tensor cores; a tile with few rows is bound by the
bytes of the weights, so it takes a small block_m and deep pipelines instead. All sizes are bounded
by registers (accumulators: block_m * columns / threads each) and by shared memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from reap_kernels.contract import Call
from reap_kernels.triton import order


@dataclass(frozen=True)
class Tile:
    """How one grouped GEMM is cut. block_n counts columns of the result: gate_up reads twice that
    many weight rows where there is a gate."""

    block_n: int
    block_k: int
    warps: int
    stages: int
    # Row tiles of one expert that run side by side and share weights in the cache, at least. With
    # 16 the 108 to 148 programs that run at a time cover about as many columns as rows.
    group_m: int = 16

    def shared_bytes(self, block_m: int, halves: int, itemsize: int) -> int:
        """Shared memory of the pipelined operands."""
        return self.stages * self.block_k * (block_m + halves * self.block_n) * itemsize


@dataclass(frozen=True)
class Config:
    """The tiles of both kernels, which share block_m and with it one table of row tiles."""

    block_m: int
    gate_up: Tile
    down: Tile
    # Of tiles: 2 if an expert's last rows, where they are few, are half a tile.
    sizes: int = 1
    # Column tiles of down that all rows go through before the next ones: `order` counts.
    slab: int = 1 << 30

    def ordered(self, call: Call, cache: int, hinted: bool) -> Config:
        """With the order of the tiles that moves few bytes past a cache of that size: as many row
        tiles side by side as leave a fifth of it to the weights that pass by, if that is more (an
        expert that is one group reads its weights once), and down in slabs where that pays. hinted:
        loads can say that they leave the cache first; without that they push a slab's sums out."""
        elements = cache * 4 // 5 // (self.block_m * call.hidden_states.element_size())
        up, down = (
            replace(tile, group_m=max(tile.group_m, elements // depth))
            for tile, depth in ((self.gate_up, call.H), (self.down, call.I))
        )
        if not hinted:
            return replace(self, gate_up=up, down=down)
        slab = order.slab_tiles(call, down.block_n, cache)
        if slab * down.block_n < call.H:  # there the cache is the slab's
            down = self.down
        return replace(self, gate_up=up, down=down, slab=slab)

    def shared_bytes(self, gated: bool, itemsize: int) -> int:
        """Shared memory of the kernel that needs more. [bytes]"""
        return max(
            self.gate_up.shared_bytes(self.block_m, 2 if gated else 1, itemsize),
            self.down.shared_bytes(self.block_m, 1, itemsize),
        )


@dataclass(frozen=True)
class Choice:
    """A config, and the calls it is for: 16- or 32-bit models, at most `rows` slots per expert on
    average or experts no wider than `width`, and, unless it says otherwise, aligned memory."""

    config: Config
    why: str
    bits: int = 16
    rows: float = math.inf
    width: int = 0
    unaligned: bool = False

    def suits(self, call: Call) -> bool:
        bits = 8 * call.hidden_states.element_size()
        few = call.T * call.K <= self.rows * call.E or min(call.H, call.I) <= self.width
        return bits == self.bits and few and (self.unaligned or aligned(call))


def aligned(call: Call) -> bool:
    """Whether rows can be read 16 bytes at a time, as triton finds out: sizes and strides are
    multiples of 16 elements, but for the stride of 1 along the rows."""
    tensors = (call.hidden_states, call.gate_up_proj, call.down_proj)
    steps = [stride for tensor in tensors for stride in tensor.stride()]
    rows = all(1 in tensor.stride() and tensor.data_ptr() % 16 == 0 for tensor in tensors)
    return rows and all(n % 16 == 0 for n in (call.H, call.I)) and all(
        n == 1 or n % 16 == 0 for n in steps
    )  # fmt: skip


FFMA = (
    Choice(
        Config(64, Tile(32, 16, 8, 3), Tile(64, 32, 8, 2)),
        "fp32 keeps all its bits, so it multiplies without tensor cores, from registers",
        bits=32,
    ),
    Choice(
        Config(32, Tile(32, 16, 8, 2), Tile(32, 16, 8, 2)),
        "memory that is read an element at a time takes a pointer per element",
        bits=32,
        unaligned=True,
    ),
)
UNALIGNED = Choice(
    Config(64, Tile(32, 32, 8, 2), Tile(64, 32, 8, 2)),
    "memory that is read an element at a time takes a pointer per element",
    unaligned=True,
)

# Per family the first choice that suits a call and fits the chip.
CHOICES: dict[str, tuple[Choice, ...]] = {
    "sm_80": (
        Choice(
            Config(16, Tile(64, 64, 4, 4), Tile(128, 64, 4, 4)),
            "next to no rows: what a program copies are weights, as many at a time as fit",
            rows=8,
        ),
        Choice(
            Config(32, Tile(64, 64, 4, 4), Tile(64, 64, 4, 4)),
            "few rows: bound by the weights' bytes, so half-empty tiles cost nothing",
            rows=24,
            width=64,
        ),
        Choice(
            Config(64, Tile(64, 64, 4, 3), Tile(128, 64, 4, 3)),
            "two programs per SM hide each other's latency",
            rows=96,
        ),
        Choice(
            Config(128, Tile(64, 32, 8, 4), Tile(128, 32, 8, 4), sizes=2),
            "64 accumulator registers per thread, the most that the epilogue leaves room for",
        ),
        UNALIGNED,
        *FFMA,
    ),
    "sm_86": (
        Choice(
            Config(16, Tile(32, 64, 4, 4), Tile(64, 64, 4, 4)),
            "as on sm_80, two programs in 99 KB of shared memory",
            rows=8,
        ),
        Choice(
            Config(32, Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
            "few rows: bound by the weights' bytes",
            rows=24,
            width=64,
        ),
        Choice(
            Config(64, Tile(64, 32, 4, 3), Tile(128, 32, 4, 3)),
            "two programs in 99 KB of shared memory",
            rows=96,
        ),
        Choice(
            Config(128, Tile(64, 32, 8, 3), Tile(128, 32, 8, 3), sizes=2),
            "as on sm_80, with one stage less",
        ),
        UNALIGNED,
        *FFMA,
    ),
    "sm_90": (
        Choice(
            Config(16, Tile(64, 64, 4, 5), Tile(128, 64, 4, 5)),
            "as on sm_80, without wgmma, which takes 64 rows: three programs per SM",
            rows=8,
        ),
        Choice(
            Config(64, Tile(64, 64, 4, 4), Tile(128, 64, 4, 4)),
            "64 rows are one warpgroup's wgmma, the least it takes",
            rows=96,
            width=64,
        ),
        Choice(
            Config(128, Tile(128, 64, 8, 3), Tile(256, 64, 8, 4), sizes=2),
            "two warpgroups of 64x256 each, the widest wgmma; on an H100 gate_up was 8% faster "
            "with 3 stages than with 4, and down 9% with 4 than with 3",
        ),
        UNALIGNED,
        *FFMA,
    ),
    "sm_100": (
        Choice(
            Config(64, Tile(64, 64, 4, 4), Tile(128, 64, 4, 4)),
            "64 rows, the least that tcgen05 takes",
            rows=96,
            width=64,
        ),
        Choice(
            Config(128, Tile(128, 64, 8, 3), Tile(256, 64, 8, 3), sizes=2),
            "128x256 accumulators: half of the tensor memory, the epilogue's registers do the rest",
        ),
        UNALIGNED,
        *FFMA,
    ),
    "gfx942": (
        Choice(
            Config(32, Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
            "few rows: bound by the weights' bytes",
            rows=24,
            width=64,
        ),
        Choice(
            Config(128, Tile(64, 64, 8, 2), Tile(128, 64, 8, 2), sizes=2),
            "what fits 64 KB of shared memory",
        ),
        UNALIGNED,
        Choice(
            Config(64, Tile(32, 32, 4, 2), Tile(64, 32, 4, 2)),
            "fp32 has matrix instructions of its own here",
            bits=32,
            unaligned=True,
        ),
    ),
    "interpreter": tuple(
        Choice(
            Config(16, Tile(32, 32, 1, 1, group_m=2), Tile(64, 16, 1, 1, group_m=2), sizes=2),
            "small tests have several tiles",
            bits=bits,
            unaligned=True,
        )
        for bits in (16, 32)
    ),
}

# Shared memory that one program may have, where the device does not say. [bytes]
SHARED_LIMIT = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
    "interpreter": 1 << 30,
}

# The last cache before memory, where the device does not say. [bytes]
CACHE = {
    "sm_80": 40 << 20,
    "sm_86": 6 << 20,
    "sm_90": 50 << 20,
    "sm_100": 126 << 20,
    "gfx942": 256 << 20,
    "interpreter": 0,
}

# Where triton tells the cache what to let go of first.
HINTED = ("sm_90", "sm_100")

_FAMILY = {(8, 0): "sm_80", (8, 7): "sm_80", (8, 6): "sm_86", (8, 9): "sm_86"}
_FAMILY_BY_MAJOR = {9: "sm_90", 10: "sm_100", 12: "sm_86"}  # 12 has sm_86's mma and shared memory
_CDNA = ("gfx90a", "gfx942", "gfx950")


def family(device: torch.device) -> str | None:
    """The key of CHOICES for a GPU; None where nothing was ever compiled for its kind."""
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName
        return "gfx942" if name.startswith(_CDNA) else None
    capability = torch.cuda.get_device_capability(device)
    return _FAMILY.get(capability) or _FAMILY_BY_MAJOR.get(capability[0])


def shared_limit(device: torch.device, kind: str) -> int:
    """Shared memory that one program may have. [bytes]"""
    if device.type == "cpu":
        return SHARED_LIMIT[kind]
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", SHARED_LIMIT[kind])


def cache_size(device: torch.device, kind: str) -> int:
    """The last cache before memory. [bytes]"""
    if kind in ("gfx942", "interpreter"):  # AMD's driver tells of the L2, not of what is behind it
        return CACHE[kind]
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", CACHE[kind])


def choose(call: Call, kind: str, limit: int, cache: int) -> Config | None:
    """The first config of a family that suits the call and fits `limit` bytes of shared memory, in
    the order that suits `cache` bytes."""
    itemsize = call.hidden_states.element_size()
    for choice in CHOICES[kind]:
        if choice.suits(call) and choice.config.shared_bytes(call.gated, itemsize) <= limit:
            return choice.config.ordered(call, cache, kind in HINTED)
    return None
