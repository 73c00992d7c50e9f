# mypy: allow-untyped-defs
"""y = inner W_down + b, and from its fp32 accumulator at once: norm, peak, gate and combine.

    inner [S, I], W [E, H, I]  ->  out [T, H] += gate * y,  partial sums of y^2 and max |y|

No y is stored. Each tile writes one partial per row to a cell of its own, and `finish` adds those
in a fixed order: norms and peaks have the same bits in every run. With `atomic` combine the gated
rows are added to out [T, H] fp32 where they arrive; with the deterministic one they go to a slab
[S, W] of W columns, one cell per slot, which `finish` adds in the order of k.
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
    locate_slab,
    multiply,
    strides,
)

# Columns that are combined at once. Each element of a piece has a pointer of its own; those of a
# whole tile do not fit in the registers beside the accumulator.
PIECE = tl.constexpr(64)


@triton.jit
def _halves(y):
    """[M, N] -> its left and its right [M, N/2], without leaving the registers."""
    halved = tl.reshape(y, (y.shape[0], 2, y.shape[1] // 2))
    return tl.split(tl.permute(halved, (0, 2, 1)))


@triton.jit
def _add(y, cell, real, left, DETERMINISTIC: tl.constexpr, EVEN_N: tl.constexpr):
    """Stores or adds y [M, N] at the rows that start at `cell` [M], of which `left` columns are."""
    n = tl.arange(0, y.shape[1])
    stored = real[:, None] if EVEN_N else real[:, None] & (n < left)[None, :]
    if DETERMINISTIC:
        tl.store(cell[:, None] + n[None, :], y, mask=stored)
    else:
        tl.atomic_add(cell[:, None] + n[None, :], y, mask=stored, sem="relaxed")


@triton.jit
def _combine(y, cell, real, left, DETERMINISTIC: tl.constexpr, EVEN_N: tl.constexpr):
    """The same, piece by piece."""
    N: tl.constexpr = y.shape[1]
    HALF: tl.constexpr = N // 2
    if N <= PIECE:
        _add(y, cell, real, left, DETERMINISTIC, EVEN_N)
    else:
        a, b = _halves(y)
        if HALF <= PIECE:
            _add(a, cell, real, left, DETERMINISTIC, EVEN_N)
            _add(b, cell + HALF, real, left - HALF, DETERMINISTIC, EVEN_N)
        else:
            tl.static_assert(HALF == 2 * PIECE)
            c, d = _halves(a)
            _add(c, cell, real, left, DETERMINISTIC, EVEN_N)
            _add(d, cell + PIECE, real, left - PIECE, DETERMINISTIC, EVEN_N)
            c, d = _halves(b)
            _add(c, cell + HALF, real, left - HALF, DETERMINISTIC, EVEN_N)
            _add(d, cell + HALF + PIECE, real, left - HALF - PIECE, DETERMINISTIC, EVEN_N)


@triton.jit(
    do_not_specialize=["S", "slab", "group_m"],
    do_not_specialize_on_alignment=["gates"],
)
def down_kernel(
    inner,  # rows by sorted position [S, I] model dtype
    down_proj,  # [E, H, I] in any order of memory, model dtype
    down_bias,  # [E, H] model dtype, or None
    gates,  # [T, K] bf16, fp16 or fp32
    combined,  # [T, H] fp32; [S, W] fp32 if DETERMINISTIC
    squares,  # column tile, sorted position -> sum of y^2 [tiles, S] fp32, or None
    peaks,  # column tile, sorted position -> max |y| [tiles, S] fp32, or None
    order,  # sorted position -> slot [S] int32
    offsets,  # expert -> first sorted position [E+1] int32
    first_tile,  # expert -> first row tile [E+1] int32
    tile_expert,  # row tile -> expert [row tiles] int32
    E,
    H,
    I,  # noqa: E741
    S,
    first_column,  # of this launch; a multiple of BLOCK_N
    slab,  # column tiles that all rows go through before the next
    group_m,
    W,  # columns of this launch: H if not DETERMINISTIC
    stride_we,
    stride_wh,
    stride_wi,
    stride_be,
    stride_bh,
    stride_gt,
    stride_gk,
    K: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVICT: tl.constexpr,  # which operands leave the cache first: in slabs, before the sums
    SIZES: tl.constexpr,  # 2: a tile of few rows is half a tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    columns = tl.cdiv(W, BLOCK_N)
    if program >= tl.load(first_tile + E) * columns:
        return
    program, first, columns = locate_slab(program, first_tile, E, columns, slab)
    expert, start, end, column = locate(
        program, tile_expert, first_tile, offsets, columns, group_m, BLOCK_M
    )
    column += first
    # An expert's last tile may fill no half of its rows: then half a tile is computed.
    tail = (end - start <= BLOCK_M // SIZES).to(tl.int32) * (SIZES - 1)
    for part in tl.static_range(SIZES):
        if tail == part:
            position = start + tl.arange(0, BLOCK_M // (1 + part))
            real = position < end
            local = column * BLOCK_N + tl.arange(0, BLOCK_N)
            n = first_column + local
            inside = n < H
            k = tl.arange(0, BLOCK_K)

            row = tl.minimum(position, end - 1).to(tl.int64)
            a = inner + row[:, None] * I + k[None, :]
            weights = down_proj + expert.to(tl.int64) * stride_we
            b = weights + n.to(tl.int64)[None, :] * stride_wh + k.to(tl.int64)[:, None] * stride_wi
            step_b = BLOCK_K * tl.cast(stride_wi, tl.int64)

            y = tl.zeros((position.shape[0], BLOCK_N), tl.float32)
            for done in range(0, I, BLOCK_K):
                x = load_rows(a, k, I - done, EVEN_K, EVICT)
                y = multiply(x, load_weights(b, k, I - done, inside, EVEN_K, EVEN_N, EVICT), y)
                a += BLOCK_K
                b += step_b

            if down_bias is not None:
                bias = down_bias + expert.to(tl.int64) * stride_be + n.to(tl.int64) * stride_bh
                y += tl.load(bias, mask=inside, other=0.0).to(tl.float32)[None, :]

            if squares is not None:  # columns past H are zero here: no mask
                partial = (first_column // BLOCK_N + column).to(tl.int64) * S + position
                tl.store(squares + partial, tl.sum(y * y, axis=1), mask=real)
                tl.store(peaks + partial, tl.max(tl.abs(y), axis=1), mask=real)

            slot = tl.load(order + row)
            token = (slot // K).to(tl.int64)
            gate = tl.load(gates + token * stride_gt + (slot % K).to(tl.int64) * stride_gk)
            y *= gate.to(tl.float32)[:, None]
            if DETERMINISTIC:
                cell = combined + slot.to(tl.int64) * W + column * BLOCK_N
                left = W - column * BLOCK_N
            else:
                cell = combined + token * H + (first_column + column * BLOCK_N)
                left = H - first_column - column * BLOCK_N
            _combine(y, cell, real, left, DETERMINISTIC, EVEN_N)


def arguments(call: Call, tiles: Tiles, buffers: dict[str, Tensor | None], config: Config) -> dict:
    """The down kernel's arguments by name, but for first_column, W and slab.

    buffers: inner, combined, squares and peaks.
    """
    w, bias, gates = call.down_proj, call.down_bias, call.top_k_weights
    if call.transposed:
        w = w.mT
    tile = config.down
    return {
        "down_proj": w,  # [E, H, I]
        "down_bias": bias,  # [E, H]
        "gates": gates,  # [T, K]
        **buffers,
        **tiles.arguments(),
        "E": call.E,
        "H": call.H,
        "I": call.I,
        "S": call.T * call.K,
        **strides("stride_we stride_wh stride_wi", w),
        **strides("stride_be stride_bh", bias),
        **strides("stride_gt stride_gk", gates),
        "K": call.K,
        "DETERMINISTIC": call.deterministic,
        "EVEN_N": call.H % tile.block_n == 0,
        "EVEN_K": call.I % tile.block_k == 0,
        "EVICT": "evict_first" if config.slab * tile.block_n < call.H else "",
        "SIZES": config.sizes,
        "BLOCK_M": config.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "group_m": tile.group_m,
    }
