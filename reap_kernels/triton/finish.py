# mypy: allow-untyped-defs
"""Fixed-order sums of what down_kernel left: norms and peaks per slot, and the output's dtype.

norms[slot] = sqrt(sum over column tiles of squares), peaks[slot] = max over column tiles
out[t] = combined[t], or the sum over k, in order, of the slab's rows of token t
"""

import triton
import triton.language as tl

from reap_kernels.contract import Call, Saliency, Summed
from reap_kernels.triton.routing import Tiles
from reap_kernels.triton.tiles import narrow, strides


@triton.jit(
    do_not_specialize=["T", "S", "tiles"],
    do_not_specialize_on_alignment=["ids"],
)
def finish_kernel(
    combined,  # as written by down_kernel
    squares,  # [tiles, S] fp32; None, as the next: leave norms and peaks alone
    partial_peaks,  # [tiles, S] fp32
    out,  # [T, H] model dtype
    norms,  # [T, K] fp32
    peaks,  # [T, K] fp32
    ids,  # [T, K] int32 or int64
    order,  # sorted position -> slot [S] int32
    offsets,  # expert -> first sorted position [E+1] int32
    E,
    T,
    H,
    S,
    tiles,  # partials per slot; 0: leave norms and peaks alone
    first_column,
    W,
    stride_it,
    stride_ik,
    K: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    CAST: tl.constexpr,  # False: `combined` is `out` itself
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the partials of BLOCK_S slots and writes BLOCK_T * W elements of the output."""
    program = tl.program_id(0)
    position = program * BLOCK_S + tl.arange(0, BLOCK_S)
    if squares is not None and tiles > 0:
        total = tl.zeros((BLOCK_S,), tl.float32)
        peak = tl.zeros((BLOCK_S,), tl.float32)
        routed = position < tl.load(offsets + E)  # others have no expert, so no partials
        for tile in range(tiles):
            partial = tl.cast(tile, tl.int64) * S + position
            total += tl.load(squares + partial, mask=routed, other=0.0)
            found = tl.load(partial_peaks + partial, mask=routed, other=0.0)
            peak = tl.maximum(peak, found, propagate_nan=tl.PropagateNan.ALL)
        peak = tl.where(total == total, peak, total)  # the maximum of a tile may lose a NaN
        slot = tl.load(order + position, mask=position < S, other=0)
        tl.store(norms + slot, tl.sqrt_rn(total), mask=position < S)
        tl.store(peaks + slot, peak, mask=position < S)

    token = (program * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    if CAST:
        for first in range(0, W, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            stored = (token < T)[:, None] & (n < W)[None, :]
            if DETERMINISTIC:
                y = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
                for k in range(K):
                    id = tl.load(ids + token * stride_it + k * stride_ik, mask=token < T, other=E)
                    row = combined + (token * K + k)[:, None] * W + n[None, :]
                    y += tl.load(row, mask=stored & (id < E)[:, None], other=0.0)
            else:
                y = tl.load(combined + token[:, None] * H + n[None, :], mask=stored, other=0.0)
            cell = out + token[:, None] * H + first_column + n[None, :]
            tl.store(cell, narrow(y, out.dtype.element_ty), mask=stored)


def arguments(call: Call, tiles: Tiles, result: Saliency | Summed) -> dict:
    """The kernel's arguments by name, but for the buffers, their sizes and the slab."""
    ids = call.top_k_index
    return {
        "out": result.out,
        "norms": result.norms,
        "peaks": result.peaks,
        "ids": ids,
        "order": tiles.order,
        "offsets": tiles.offsets,
        "E": call.E,
        "T": call.T,
        "H": call.H,
        "S": call.T * call.K,
        **strides("stride_it stride_ik", ids),
        "K": call.K,
        "DETERMINISTIC": call.deterministic,
    }
