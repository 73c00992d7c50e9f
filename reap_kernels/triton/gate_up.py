# mypy: allow-untyped-defs
"""inner = act(x W_gate + b_gate) * (x W_up + b_up), one expert's weights per row tile.

    x [T, H], W [E, 2I, H]  ->  inner [S, I], rows in the sorted order of the slots

Rows of x are gathered in the load. Both halves of a gated tile are made by one program: with a
concatenated layout in two accumulators, with an interleaved one in a single accumulator of twice
the width whose columns are split in registers, so that weights are read in the order of memory.
Programs beyond the tiles zero the sums that the down projection adds to.
"""

import triton
import triton.language as tl
from torch import Tensor

from reap_kernels.contract import Call
from reap_kernels.triton.configs import Config
from reap_kernels.triton.routing import Tiles
from reap_kernels.triton.tiles import (
    load_rows,
    load_weights,
    locate,
    multiply,
    narrow,
    strides,
)

ZEROED = tl.constexpr(1 << 13)  # sums per program


@triton.jit
def _elementwise(x, KIND: tl.constexpr):
    if KIND == "silu":
        return x * tl.sigmoid(x)
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":  # (1 + tanh(z)) / 2 = sigmoid(2 z)
        return x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    elif KIND == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        tl.static_assert(KIND == "relu2")
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return x * x


@triton.jit
def _glu(g, u, KIND: tl.constexpr, alpha, limit, offset):
    if KIND == "swiglu_clamped":
        g = tl.minimum(g, limit, propagate_nan=tl.PropagateNan.ALL)
        u = tl.clamp(u, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        return g * tl.sigmoid(alpha * g) * (u + offset)
    else:
        return _elementwise(g, KIND) * u


@triton.jit(do_not_specialize=["T", "group_m"])
def gate_up_kernel(
    hidden_states,  # [T, H] model dtype
    gate_up_proj,  # [E, R, H] in any order of memory, model dtype
    gate_up_bias,  # [E, R] model dtype, or None
    inner,  # [S, I] model dtype
    sums,  # to be zeroed [T, H] fp32, or None
    order,  # sorted position -> slot [S] int32
    offsets,  # expert -> first sorted position [E+1] int32
    first_tile,  # expert -> first row tile [E+1] int32
    tile_expert,  # row tile -> expert [row tiles] int32
    E,
    T,
    H,
    I,  # noqa: E741
    group_m,
    stride_xt,
    stride_xh,
    stride_we,
    stride_wr,
    stride_wh,
    stride_be,
    stride_br,
    alpha,
    limit,
    offset,
    K: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    SIZES: tl.constexpr,  # 2: a tile of few rows is half a tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TWO: tl.constexpr = GATED and not INTERLEAVED
    WIDTH: tl.constexpr = 2 * BLOCK_N if INTERLEAVED else BLOCK_N

    program = tl.program_id(0)
    columns = tl.cdiv(I, BLOCK_N)
    tiles = tl.load(first_tile + E) * columns
    if program >= tiles:
        if sums is not None:
            cell = (program - tiles).to(tl.int64) * ZEROED + tl.arange(0, ZEROED)
            tl.store(sums + cell, 0.0, mask=cell < T.to(tl.int64) * H)
        return
    expert, start, end, column = locate(
        program, tile_expert, first_tile, offsets, columns, group_m, BLOCK_M
    )
    # An expert's last tile may fill no half of its rows: then half a tile is computed.
    tail = (end - start <= BLOCK_M // SIZES).to(tl.int32) * (SIZES - 1)
    for part in tl.static_range(SIZES):
        if tail == part:
            position = start + tl.arange(0, BLOCK_M // (1 + part))
            slot = tl.load(order + tl.minimum(position, end - 1))
            token = (slot // K).to(tl.int64)
            row = column * WIDTH + tl.arange(0, WIDTH)  # of the weights; of their first half if TWO
            inside = row < (2 * I if INTERLEAVED else I)
            k = tl.arange(0, BLOCK_K)

            a = hidden_states + token[:, None] * stride_xt + k.to(tl.int64)[None, :] * stride_xh
            weights = gate_up_proj + expert.to(tl.int64) * stride_we
            b = (
                weights
                + row.to(tl.int64)[None, :] * stride_wr
                + k.to(tl.int64)[:, None] * stride_wh
            )
            half = I * tl.cast(stride_wr, tl.int64)
            step_a = BLOCK_K * tl.cast(stride_xh, tl.int64)
            step_b = BLOCK_K * tl.cast(stride_wh, tl.int64)

            first = tl.zeros((position.shape[0], WIDTH), tl.float32)
            second = tl.zeros((position.shape[0], WIDTH), tl.float32)
            for done in range(0, H, BLOCK_K):
                x = load_rows(a, k, H - done, EVEN_K, "")
                first = multiply(x, load_weights(b, k, H - done, inside, EVEN_K, EVEN_N, ""), first)
                if TWO:
                    up = load_weights(b + half, k, H - done, inside, EVEN_K, EVEN_N, "")
                    second = multiply(x, up, second)
                a += step_a
                b += step_b

            if gate_up_bias is not None:
                bias = gate_up_bias + expert.to(tl.int64) * stride_be + row.to(tl.int64) * stride_br
                first += tl.load(bias, mask=inside, other=0.0).to(tl.float32)[None, :]
                if TWO:
                    bias += I * tl.cast(stride_br, tl.int64)
                    second += tl.load(bias, mask=inside, other=0.0).to(tl.float32)[None, :]
            if INTERLEAVED:
                first, second = tl.split(tl.reshape(first, (position.shape[0], BLOCK_N, 2)))
            if GATED:
                y = _glu(first, second, KIND, alpha, limit, offset)
            else:
                y = _elementwise(first, KIND)

            n = column * BLOCK_N + tl.arange(0, BLOCK_N)
            cell = inner + position.to(tl.int64)[:, None] * I + n[None, :]
            stored = (position < end)[:, None]
            if not EVEN_N:
                stored &= (n < I)[None, :]
            tl.store(cell, narrow(y, inner.dtype.element_ty), mask=stored)


def arguments(
    call: Call,
    tiles: Tiles,
    inner: Tensor,  # [S, I] model dtype
    sums: Tensor | None,  # to be zeroed [T, H] fp32
    config: Config,
) -> dict:
    """The kernel's arguments by name."""
    x, w, bias = call.hidden_states, call.gate_up_proj, call.gate_up_bias
    if call.transposed:
        w = w.mT
    tile = config.gate_up
    return {
        "hidden_states": x,  # [T, H]
        "gate_up_proj": w,  # [E, R, H]
        "gate_up_bias": bias,  # [E, R]
        "inner": inner,
        "sums": sums,
        **tiles.arguments(),
        "E": call.E,
        "T": call.T,
        "H": call.H,
        "I": call.I,
        **strides("stride_xt stride_xh", x),
        **strides("stride_we stride_wr stride_wh", w),
        **strides("stride_be stride_br", bias),
        "alpha": call.activation.alpha,
        "limit": call.activation.limit,
        "offset": call.activation.offset,
        "K": call.K,
        "KIND": call.activation.kind,
        "GATED": call.gated,
        "INTERLEAVED": call.interleaved,
        "EVEN_N": call.I % tile.block_n == 0,
        "EVEN_K": call.H % tile.block_k == 0,
        "SIZES": config.sizes,
        "BLOCK_M": config.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "group_m": tile.group_m,
    }


def programs(call: Call, tiles: Tiles, sums: Tensor | None, config: Config) -> int:
    zeroing = 0 if sums is None else triton.cdiv(sums.numel(), ZEROED.value)
    return tiles.bound * triton.cdiv(call.I, config.gate_up.block_n) + zeroing
