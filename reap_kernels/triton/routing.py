# mypy: allow-untyped-defs
"""Top-k ids -> slots sorted by expert and the table of row tiles, on the device, in three launches.

    count   slots -> how many of each expert in each block of 128 slots
    scan    how many of an expert there are in the blocks before
    place   slot -> sorted position; expert -> tiles

Few slots are one launch, `route`, in which every program counts all of them for itself.

A stable counting sort: no host reads a count, and nothing is padded. An expert of n slots has
ceil(n / BLOCK_M) row tiles, of which the last is partly masked. The host knows only a bound on the
number of tiles; the programs above the true number return at once.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from reap_kernels.contract import Call
from reap_kernels.triton.replay import Recorder
from reap_kernels.triton.tiles import strides

BLOCK = 128  # slots per program: their mutual order is found by comparing all pairs
WIDE = 1024  # slots that are counted at a time where one launch counts all
ONE_LAUNCH_SLOTS, ONE_LAUNCH_EXPERTS = 4 * WIDE, 512
# Numbers that change with the tokens of a call. Nothing is compiled for their values.
FREE = ("S", "blocks")


class Tiles(NamedTuple):
    """Where the grouped kernels find their rows. A slot is token * K + k."""

    order: Tensor  # sorted position -> slot; slots without expert come last [S] int32
    offsets: Tensor  # expert -> first sorted position; [E] ends the last expert [E+1] int32
    first_tile: Tensor  # expert -> its first row tile; [E] is their number [E+1] int32
    tile_expert: Tensor  # row tile -> expert [bound] int32
    bound: int  # of the number of row tiles

    def arguments(self) -> dict[str, Tensor]:
        return {name: value for name, value in self._asdict().items() if name != "bound"}


@triton.jit
def _experts(ids, slot, E, S, stride_it, stride_ik, K: tl.constexpr):
    """The expert of each slot, E for none and past the last slot. [slots] int32"""
    token = (slot // K).to(tl.int64)
    id = tl.load(
        ids + token * stride_it + (slot % K).to(tl.int64) * stride_ik, mask=slot < S, other=E
    )
    tl.device_assert(id >= 0, "top_k_index holds an id below 0, must be >= 0")
    return tl.minimum(id, E).to(tl.int32)


@triton.jit
def _tables(
    program, total, offsets, first_tile, tile_expert, E,
    BINS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Writes the tables of all experts, from how many slots each has (those of none left out), and
    returns where each one's positions start. [BINS] int32"""
    lane = tl.arange(0, BLOCK)
    bins = tl.arange(0, BINS)
    starts = tl.cumsum(total) - total
    tiles = tl.cdiv(total, BLOCK_M)
    firsts = tl.cumsum(tiles) - tiles
    if program == 0:
        tl.store(offsets + bins, starts, mask=bins <= E)
        tl.store(first_tile + bins, firsts, mask=bins <= E)
    if program < E:
        first = tl.sum(tl.where(bins == program, firsts, 0))
        here = tl.sum(tl.where(bins == program, tiles, 0))
        for done in range(0, here, BLOCK):
            tl.store(tile_expert + first + done + lane, program, mask=done + lane < here)
    return starts


@triton.jit
def _place(slot, expert, first, order, S, BLOCK: tl.constexpr):
    """Puts a block's slots into order. first: where the block's slots of that expert go, per slot
    [BLOCK]."""
    lane = tl.arange(0, BLOCK)
    twins = (expert[:, None] == expert[None, :]) & (lane[None, :] < lane[:, None])
    rank = tl.sum(twins.to(tl.int32), axis=1)
    tl.store(order + first + rank, slot, mask=slot < S)


@triton.jit(debug=True, do_not_specialize=FREE, do_not_specialize_on_alignment=["ids"])
def route_kernel(
    ids,  # [T, K] int32 or int64
    order,  # [S] int32
    offsets,  # [E+1] int32
    first_tile,  # [E+1] int32
    tile_expert,  # [bound] int32
    E,
    S,
    blocks,
    stride_it,
    stride_ik,
    K: tl.constexpr,
    BINS: tl.constexpr,  # power of two above E + 1
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    program = tl.program_id(0)
    total = tl.zeros((BINS,), tl.int32)
    before = tl.zeros((BINS,), tl.int32)  # of the slots before this program's
    for first in range(0, S, WIDE):
        slot = first + tl.arange(0, WIDE)
        expert = _experts(ids, slot, E, S, stride_it, stride_ik, K)
        total += tl.histogram(expert, BINS)
        before += tl.histogram(tl.where(slot < program * BLOCK, expert, E + 1), BINS)
    total = tl.where(tl.arange(0, BINS) < E, total, 0)
    starts = _tables(program, total, offsets, first_tile, tile_expert, E, BINS, BLOCK, BLOCK_M)
    if program < blocks:
        slot = program * BLOCK + tl.arange(0, BLOCK)
        expert = _experts(ids, slot, E, S, stride_it, stride_ik, K)
        _place(slot, expert, tl.gather(starts + before, expert, axis=0), order, S, BLOCK)


@triton.jit(debug=True, do_not_specialize=FREE, do_not_specialize_on_alignment=["ids"])
def count_kernel(
    ids,  # [T, K] int32 or int64
    counts,  # expert (E: none), block -> slots [E+1, blocks] int32
    E,
    S,
    blocks,
    stride_it,
    stride_ik,
    K: tl.constexpr,
    BINS: tl.constexpr,  # power of two above E
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    bins = tl.arange(0, BINS)
    found = tl.histogram(_experts(ids, slot, E, S, stride_it, stride_ik, K), BINS)
    tl.store(counts + bins.to(tl.int64) * blocks + block, found, mask=bins <= E)


@triton.jit(do_not_specialize=FREE)
def scan_kernel(
    counts,  # in: as count_kernel left them; out: summed over the blocks before [E+1, blocks] int32
    totals,  # expert -> slots [E+1] int32
    blocks,
    BLOCK: tl.constexpr,
):
    expert = tl.program_id(0)
    row = counts + expert.to(tl.int64) * blocks
    before = 0
    for first in range(0, blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        here = tl.load(row + block, mask=block < blocks, other=0)
        tl.store(row + block, before + tl.cumsum(here) - here, mask=block < blocks)
        before += tl.sum(here)
    tl.store(totals + expert, before)


@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=["ids"])
def place_kernel(
    ids,  # [T, K] int32 or int64
    before,  # expert, block -> slots of the expert in the blocks before [E+1, blocks] int32
    totals,  # expert -> slots [E+1] int32
    order,  # [S] int32
    offsets,  # [E+1] int32
    first_tile,  # [E+1] int32
    tile_expert,  # [bound] int32
    E,
    S,
    blocks,
    stride_it,
    stride_ik,
    K: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    program = tl.program_id(0)
    bins = tl.arange(0, BINS)
    total = tl.load(totals + bins, mask=bins < E, other=0)
    starts = _tables(program, total, offsets, first_tile, tile_expert, E, BINS, BLOCK, BLOCK_M)
    if program < blocks:
        slot = program * BLOCK + tl.arange(0, BLOCK)
        expert = _experts(ids, slot, E, S, stride_it, stride_ik, K)
        earlier = tl.load(before + expert.to(tl.int64) * blocks + program)
        _place(slot, expert, tl.gather(starts, expert, axis=0) + earlier, order, S, BLOCK)


def route(call: Call, block_m: int, recorder: Recorder) -> Tiles:
    """The slots of a call grouped by expert, in tiles of at most block_m rows."""
    tiles = allocate(call, block_m, recorder.scratch)
    shared = arguments(call)
    blocks, E = shared["blocks"], call.E
    grid = (max(blocks, E),)
    placed = {"BLOCK_M": block_m, **tiles.arguments(), **shared}
    if in_one_launch(call):
        bins = {"BINS": triton.next_power_of_2(E + 2), "WIDE": WIDE}
        recorder.launch(route_kernel, grid, placed | bins, sanitize_overflow=False)
        return tiles
    counts = recorder.scratch(E + 1, blocks, dtype=torch.int32)
    totals = recorder.scratch(E + 1, dtype=torch.int32)
    recorder.launch(count_kernel, (blocks,), {"counts": counts, **shared}, sanitize_overflow=False)
    scanned = {"counts": counts, "totals": totals, "blocks": blocks, "BLOCK": 256}
    recorder.launch(scan_kernel, (E + 1,), scanned)
    recorder.launch(place_kernel, grid, placed | {"before": counts, "totals": totals})
    return tiles


def in_one_launch(call: Call) -> bool:
    """What every program counts again costs less than two more launches."""
    return call.T * call.K <= ONE_LAUNCH_SLOTS and call.E <= ONE_LAUNCH_EXPERTS


def allocate(call: Call, block_m: int, empty: Callable[..., Tensor]) -> Tiles:
    """Tables of any content."""
    S, E = call.T * call.K, call.E
    bound = min(S, (S + E * (block_m - 1)) // block_m)
    order, offsets, first_tile, tile_expert = (
        empty(size, dtype=torch.int32) for size in (S, E + 1, E + 1, bound)
    )
    return Tiles(order, offsets, first_tile, tile_expert, bound)


def arguments(call: Call) -> dict:
    """What the kernels that read ids have in common."""
    return {
        "ids": call.top_k_index,
        "E": call.E,
        "S": call.T * call.K,
        "blocks": triton.cdiv(call.T * call.K, BLOCK),
        **strides("stride_it stride_ik", call.top_k_index),
        "K": call.K,
        "BINS": triton.next_power_of_2(call.E + 1),
        "BLOCK": BLOCK,
    }
