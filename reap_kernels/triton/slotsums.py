# mypy: allow-untyped-defs
"""Weighted sums over an expert's slots, of rows of inner and of outputs, behind gate_up.

    inner [S, I], w [2, T, K]   ->  channels [2, E, I] = sum of w h, sums of w and of |w| [2, 2, E]
    W [E, H, I], b [E, H]       ->  outputs [2, E, H] = W channels + b (sum of w)

The down projection is linear, so that sums of outputs are its image of the sums of inner rows: the
GEMMs know nothing of them, and their price is inner and the weights read once more. Sums are fp32
over ROWS rows, fp64 over these, in one order. What weighs 0 is left out, whatever it is.
"""

import triton
import triton.language as tl
from torch import Tensor

from reap_kernels.contract import Call, Summed
from reap_kernels.triton.routing import Tiles
from reap_kernels.triton.tiles import strides

ROWS, COLUMNS = 32, 64  # of inner, that a program reads at a time
PROJECTED, DEPTH = 64, 64  # rows of the weights, and k


@triton.jit
def _sum_rows(x, w):
    """[R, N] and [R] -> [N] fp64"""
    return tl.sum(tl.where((w != 0)[:, None], w[:, None] * x, 0.0), axis=0).to(tl.float64)


@triton.jit(
    do_not_specialize=["stride_wi"],
    do_not_specialize_on_alignment=["weights"],
)
def sum_kernel(
    inner,  # rows by sorted position [S, I] model dtype
    weights,  # [2, T, K] fp32
    order,  # sorted position -> slot [S] int32
    offsets,  # expert -> first sorted position [E+1] int32
    channels,  # [2, E, I] fp32
    totals,  # sums of w, then of |w| [2, 2, E] fp32
    E,
    I,  # noqa: E741
    stride_wi,
    stride_wt,
    stride_wk,
    K: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
):
    """Program: N columns of inner and all slots of an expert."""
    blocks = tl.cdiv(I, N)
    expert = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    n = block * N + tl.arange(0, N)
    end = tl.load(offsets + expert + 1)
    plain = tl.zeros((N,), tl.float64)
    gated = tl.zeros((N,), tl.float64)
    total = tl.zeros((R,), tl.float64)
    size = tl.zeros((R,), tl.float64)
    gated_total = tl.zeros((R,), tl.float64)
    gated_size = tl.zeros((R,), tl.float64)
    for first in range(tl.load(offsets + expert), end, R):
        position = first + tl.arange(0, R)
        real = position < end
        slot = tl.load(order + position, mask=real, other=0)
        place = (slot // K).to(tl.int64) * stride_wt + (slot % K).to(tl.int64) * stride_wk
        w = tl.load(weights + place, mask=real, other=0.0)
        v = tl.load(weights + place + tl.cast(stride_wi, tl.int64), mask=real, other=0.0)
        cell = inner + position.to(tl.int64)[:, None] * I + n[None, :]
        x = tl.load(cell, mask=real[:, None] & (n < I)[None, :], other=0.0).to(tl.float32)
        plain += _sum_rows(x, w)
        gated += _sum_rows(x, v)
        total += w.to(tl.float64)
        size += tl.abs(w).to(tl.float64)
        gated_total += v.to(tl.float64)
        gated_size += tl.abs(v).to(tl.float64)
    row = expert.to(tl.int64) * I + n
    half = tl.cast(E, tl.int64) * I
    tl.store(channels + row, plain.to(tl.float32), mask=n < I)
    tl.store(channels + half + row, gated.to(tl.float32), mask=n < I)
    if block == 0:
        tl.store(totals + expert, tl.sum(total).to(tl.float32))
        tl.store(totals + E + expert, tl.sum(size).to(tl.float32))
        tl.store(totals + 2 * E + expert, tl.sum(gated_total).to(tl.float32))
        tl.store(totals + 3 * E + expert, tl.sum(gated_size).to(tl.float32))


@triton.jit
def _store_output(outputs, y, bias, totals, first, E, row, inside):
    """Where nothing was summed, weights that are no numbers are nobody's."""
    y = y + bias * tl.load(totals + first)
    empty = tl.load(totals + first + E) == 0.0
    tl.store(outputs + row, tl.where(empty, 0.0, y), mask=inside)


@triton.jit
def project_kernel(
    channels,  # [2, E, I] fp32
    totals,  # [2, 2, E] fp32
    down_proj,  # [E, H, I] in any order of memory, model dtype
    down_bias,  # [E, H] model dtype, or None
    outputs,  # [2, E, H] fp32
    E,
    H,
    I,  # noqa: E741
    stride_we,
    stride_wh,
    stride_wi,
    stride_be,
    stride_bh,
    N: tl.constexpr,
    D: tl.constexpr,
):
    """Program: N rows of an expert's weights."""
    blocks = tl.cdiv(H, N)
    expert = tl.program_id(0) // blocks
    n = tl.program_id(0) % blocks * N + tl.arange(0, N)
    inside = n < H
    wide = expert.to(tl.int64)
    rows = down_proj + wide * stride_we + n.to(tl.int64)[:, None] * stride_wh
    half = tl.cast(E, tl.int64) * I
    plain = tl.zeros((N,), tl.float32)
    gated = tl.zeros((N,), tl.float32)
    for first in range(0, I, D):
        k = first + tl.arange(0, D)
        there = inside[:, None] & (k < I)[None, :]
        cell = rows + k.to(tl.int64)[None, :] * stride_wi
        w = tl.load(cell, mask=there, other=0.0).to(tl.float32)
        h = tl.load(channels + wide * I + k, mask=k < I, other=0.0)
        gh = tl.load(channels + half + wide * I + k, mask=k < I, other=0.0)
        plain += tl.sum(w * h[None, :], axis=1)
        gated += tl.sum(w * gh[None, :], axis=1)
    bias = tl.zeros((N,), tl.float32)
    if down_bias is not None:
        cell = down_bias + wide * stride_be + n.to(tl.int64) * stride_bh
        bias = tl.load(cell, mask=inside, other=0.0).to(tl.float32)
    row = wide * H + n
    _store_output(outputs, plain, bias, totals, expert, E, row, inside)
    _store_output(
        outputs, gated, bias, totals, 2 * E + expert, E, tl.cast(E, tl.int64) * H + row, inside
    )


def sum_arguments(
    call: Call,
    tiles: Tiles,
    inner: Tensor,  # [S, I] model dtype
    totals: Tensor,  # [2, 2, E] fp32
    result: Summed,
) -> dict:
    """The first kernel's arguments by name."""
    return {
        "inner": inner,
        "weights": call.sum_weights,
        "order": tiles.order,
        "offsets": tiles.offsets,
        "channels": result.channel_sums,
        "totals": totals,
        "E": call.E,
        "I": call.I,
        **strides("stride_wi stride_wt stride_wk", call.sum_weights),
        "K": call.K,
        "R": ROWS,
        "N": COLUMNS,
    }


def project_arguments(call: Call, totals: Tensor, result: Summed) -> dict:
    """The second kernel's."""
    w = call.down_proj.mT if call.transposed else call.down_proj
    return {
        "channels": result.channel_sums,
        "totals": totals,
        "down_proj": w,
        "down_bias": call.down_bias,
        "outputs": result.output_sums,
        "E": call.E,
        "H": call.H,
        "I": call.I,
        **strides("stride_we stride_wh stride_wi", w),
        **strides("stride_be stride_bh", call.down_bias),
        "N": PROJECTED,
        "D": DEPTH,
    }


def grids(call: Call) -> tuple[tuple[int], tuple[int]]:
    return (call.E * triton.cdiv(call.I, COLUMNS),), (call.E * triton.cdiv(call.H, PROJECTED),)
