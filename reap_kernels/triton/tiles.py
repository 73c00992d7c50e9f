# mypy: allow-untyped-defs
"""What the two grouped GEMMs share: where a program's tile lies, and how its operands are read."""

import triton
import triton.language as tl
from torch import Tensor

# Decided, as by triton, when the kernels are decorated. The interpreter keeps bf16 as raw uint16:
# its dot multiplies the bit patterns and its rounding truncates, so kernels ask for this constant.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def strides(names: str, tensor: Tensor | None) -> dict[str, int]:
    """A tensor's strides as arguments of these names; zeros for a tensor that is not there."""
    split = names.split()
    return dict(
        zip(split, tensor.stride() if tensor is not None else (0,) * len(split), strict=True)
    )


@triton.jit
def locate_slab(
    program,
    first_tile,  # expert -> its first row tile; [E] is the number of row tiles [E+1] int32
    E,
    columns,  # column tiles in all
    slab,  # of a slab
):
    """A program's number in its slab of columns, and the slab's first column tile and their number.
    All row tiles of a slab run before those of the next."""
    tiles = tl.load(first_tile + E) * slab
    before = program // tiles
    first = before * slab
    return program - before * tiles, first, tl.minimum(columns - first, slab)


@triton.jit
def locate(
    program,
    tile_expert,  # row tile -> expert [row tiles] int32
    first_tile,  # expert -> its first row tile [E+1] int32
    offsets,  # expert -> its first sorted position [E+1] int32
    columns,  # column tiles
    group_m,
    BLOCK_M: tl.constexpr,
):
    """A program's expert, first position, end of the expert's positions, and column tile.

    The programs of an expert are neighbours. Among them row tiles run fastest, in groups of group_m
    whose rows stay in the L2 cache while each column tile of the weights passes by once.
    """
    expert = tl.load(tile_expert + program // columns)
    first = tl.load(first_tile + expert)
    rows = tl.load(first_tile + expert + 1) - first
    local = program - first * columns
    group = local // (group_m * columns)
    local -= group * group_m * columns
    height = tl.minimum(rows - group * group_m, group_m)
    row_tile = group * group_m + local % height
    start = tl.load(offsets + expert) + row_tile * BLOCK_M
    return expert, start, tl.load(offsets + expert + 1), local // height


@triton.jit
def load_rows(pointers, k, depth, EVEN_K: tl.constexpr, EVICT: tl.constexpr):
    """[BLOCK_M, BLOCK_K] of the left operand; rows past the end repeat the last: no mask."""
    if EVEN_K:
        return tl.load(pointers, eviction_policy=EVICT)
    return tl.load(pointers, mask=k[None, :] < depth, other=0.0, eviction_policy=EVICT)


@triton.jit
def load_weights(
    pointers, k, depth, inside, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, EVICT: tl.constexpr
):
    """[BLOCK_K, BLOCK_N] of the weights; zeros where there are none."""
    if EVEN_K and EVEN_N:
        return tl.load(pointers, eviction_policy=EVICT)
    if EVEN_K:
        return tl.load(pointers, mask=inside[None, :], other=0.0, eviction_policy=EVICT)
    within = k[:, None] < depth
    if not EVEN_N:
        within &= inside[None, :]
    return tl.load(pointers, mask=within, other=0.0, eviction_policy=EVICT)


@triton.jit
def multiply(a, b, total):
    """total + a b in fp32; fp32 operands keep all of their bits (no TF32)."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 -> dtype, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)
