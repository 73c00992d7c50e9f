# mypy: allow-untyped-defs
"""Top-k ids -> slots sorted by expert and the table of row tiles, on the device, in three launches.

    count   slots -> how many of each expert in each block of 128 slots
    scan    how many of an expert there are in the blocks before
    place   slot -> sorted position; expert -> tiles

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


class Tiles(NamedTuple):
    """Where the grouped kernels find their rows. A slot is token * K + k."""

    order: Tensor  # sorted position -> slot; slots without expert come last [S] int32
    offsets: Tensor  # expert -> first sorted position; [E] ends the last expert [E+1] int32
    first_tile: Tensor  # expert -> its first row tile; [E] is their number [E+1] int32
    tile_expert: Tensor  # row tile -> expert [bound] int32
    bound: int  # of the number of row tiles

    def arguments(self) -> dict[str, Tensor]:
        return {name: value for name, value in self._asdict().items() if name != "bound"}


@triton.jit(debug=True)  # keeps the assertion
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
    token = (slot // K).to(tl.int64)
    id = tl.load(
        ids + token * stride_it + (slot % K).to(tl.int64) * stride_ik, mask=slot < S, other=E
    )
    tl.device_assert(id >= 0, "top_k_index holds an id below 0, must be >= 0")
    bins = tl.arange(0, BINS)
    found = tl.histogram(tl.minimum(id, E).to(tl.int32), BINS)
    tl.store(counts + bins.to(tl.int64) * blocks + block, found, mask=bins <= E)


@triton.jit
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


@triton.jit
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
    lane = tl.arange(0, BLOCK)
    bins = tl.arange(0, BINS)
    total = tl.load(totals + bins, mask=bins < E, other=0)
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
    if program < blocks:
        slot = program * BLOCK + lane
        token = (slot // K).to(tl.int64)
        id = tl.load(
            ids + token * stride_it + (slot % K).to(tl.int64) * stride_ik, mask=slot < S, other=E
        )
        expert = tl.minimum(id, E).to(tl.int32)
        twins = (expert[:, None] == expert[None, :]) & (lane[None, :] < lane[:, None])
        rank = tl.sum(twins.to(tl.int32), axis=1)
        earlier = tl.load(before + expert.to(tl.int64) * blocks + program)
        position = tl.gather(starts, expert, axis=0) + earlier + rank
        tl.store(order + position, slot, mask=slot < S)


def route(call: Call, block_m: int, recorder: Recorder) -> Tiles:
    """The slots of a call grouped by expert, in tiles of at most block_m rows."""
    tiles, counts, totals = allocate(call, block_m, recorder.empty)
    shared, blocks = arguments(call), counts.shape[1]
    recorder.launch(count_kernel, (blocks,), {"counts": counts, **shared}, sanitize_overflow=False)
    scanned = {"counts": counts, "totals": totals, "blocks": blocks, "BLOCK": 256}
    recorder.launch(scan_kernel, (call.E + 1,), scanned)
    placed = {"before": counts, "totals": totals, "BLOCK_M": block_m, **tiles.arguments()}
    recorder.launch(place_kernel, (max(blocks, call.E),), placed | shared)
    return tiles


def allocate(
    call: Call, block_m: int, empty: Callable[..., Tensor]
) -> tuple[Tiles, Tensor, Tensor]:
    """Tiles, counts [E+1, blocks] and totals [E+1], of any content."""
    S, E = call.T * call.K, call.E
    bound = min(S, (S + E * (block_m - 1)) // block_m)
    order, offsets, first_tile, tile_expert, totals = (
        empty(size, dtype=torch.int32) for size in (S, E + 1, E + 1, bound, E + 1)
    )
    counts = empty(E + 1, triton.cdiv(S, BLOCK), dtype=torch.int32)
    return Tiles(order, offsets, first_tile, tile_expert, bound), counts, totals


def arguments(call: Call) -> dict:
    """What count_kernel and place_kernel have in common."""
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
