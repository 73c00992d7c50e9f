# mypy: allow-untyped-defs
"""Norms, gates and ids of one MoE layer -> exact sums per expert, in one launch.

Per slot, in fp64: g, n, n^2, g*n and (g*n)^2, each computed as torch computes it. A sum is a signed
fixed-point number of 20 limbs of 32 bits in int64, limb i weighing 2**(32*i - 320). An fp64 addend
is a 53-bit integer times a power of two, so it is added to at most three limbs as integers. Integer
additions commute: any order of programs, atomics and launches gives the same bits.

The layouts are those of `reap.exact` and `reap.layerstats`; nothing is imported from there.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from reap_kernels.triton.announce import announced
from reap_kernels.triton.replay import Plans, Recorder
from reap_kernels.triton.signature import signature
from reap_kernels.triton.tiles import strides

LIMIT = tl.constexpr(2.0**288)  # of an addend that can be summed
BLOCK = 128

_SLOTS = ("ids", "gates", "norms", "peaks")
_plans = Plans()


class Accumulators(NamedTuple):
    """What a call adds to, all on one device."""

    tokens: Tensor  # [1] int64
    count: Tensor  # [E] int64
    peak: Tensor  # [E] fp32, at least 0
    sums: Tensor  # of g, n, n^2, g*n and (g*n)^2, one quantity after another [20, 5*E] int64
    faults: Tensor  # slots per expert that cannot be summed; [E]: slots with an id < 0 [E+1] int64
    pair_count: Tensor | None = None  # of experts i < j, at j*(j-1)/2 + i [E*(E-1)/2] int64
    pair_sums: Tensor | None = None  # of g_i n_i g_j n_j [20, E*(E-1)/2] int64


@triton.jit
def _add_exact(limbs, cells, cell, value, real):
    """limbs[:, cell] += value, exactly, of `cells` sums and for fp64 values below LIMIT; bits below
    2**-320 are dropped, rounding down."""
    LOW: tl.constexpr = (1 << 32) - 1
    bits = value.to(tl.int64, bitcast=True)
    exponent = (bits >> 52) & 0x7FF
    integer = (bits & ((1 << 52) - 1)) | (tl.minimum(exponent, 1) << 52)
    integer = tl.where(bits < 0, -integer, integer)
    position = tl.maximum(exponent, 1) - 755  # of the lowest bit: exponent - 1075 + 320
    integer = integer >> tl.minimum(tl.maximum(-position, 0), 63)
    position = tl.maximum(position, 0)
    shift = position & 31
    below = (integer & LOW) << shift
    above = (integer >> 32) << shift
    first = limbs + (position >> 5) * cells + cell
    middle = (below >> 32) + (above & LOW)
    high = above >> 32
    tl.atomic_add(first, below & LOW, mask=real, sem="relaxed")
    tl.atomic_add(first + cells, middle, mask=real & (middle != 0), sem="relaxed")
    tl.atomic_add(first + 2 * cells, high, mask=real & (high != 0), sem="relaxed")


@triton.jit
def _slots(
    token,
    k,
    real,
    ids,
    gates,
    norms,
    peaks,
    mask,
    E,
    stride_it,
    stride_ik,
    stride_gt,
    stride_gk,
    stride_nt,
    stride_nk,
    stride_pt,
    stride_pk,
    stride_mt,
    K: tl.constexpr,
    RENORMALIZED: tl.constexpr,
):
    """Expert, g, n, g*n, peak, whether to add the slot, and whether it is at fault, per slot."""
    expert = tl.load(ids + token * stride_it + k * stride_ik, mask=real, other=E).to(tl.int64)
    gate = tl.load(gates + token * stride_gt + k * stride_gk, mask=real, other=0.0).to(tl.float64)
    norm = tl.load(norms + token * stride_nt + k * stride_nk, mask=real, other=0.0).to(tl.float64)
    peak = tl.load(peaks + token * stride_pt + k * stride_pk, mask=real, other=0.0).to(tl.float32)
    if RENORMALIZED:
        total = tl.zeros_like(gate)
        for column in range(K):
            other = tl.load(gates + token * stride_gt + column * stride_gk, mask=real, other=0.0)
            total += other.to(tl.float64)
        gate = tl.where(total == 0, 0.0, gate / tl.where(total == 0, 1.0, total))
    counted = real & (expert < E)
    if mask is not None:
        counted &= tl.load(mask + token * stride_mt, mask=real, other=0) != 0
    weighted = gate * norm
    summable = (tl.abs(gate) < LIMIT) & (norm * norm < LIMIT) & (weighted * weighted < LIMIT)
    summable &= (norm >= 0) & (expert >= 0) & (peak >= 0) & (peak < float("inf"))
    return expert, gate, norm, weighted, peak, counted & summable, counted & ~summable


@triton.jit(
    do_not_specialize=["T"],
    do_not_specialize_on_alignment=["ids", "gates", "norms", "peaks", "mask"],
)
def statistics_kernel(
    ids,  # [T, K] int32 or int64
    gates,  # [T, K] any float
    norms,  # [T, K] any float
    peaks,  # [T, K] any float
    mask,  # tokens to count [T] uint8, or None
    tokens,  # as in Accumulators, peak as its int32 bits
    count,
    peak,
    sums,
    faults,
    pair_count,
    pair_sums,
    T,
    E,
    stride_it,
    stride_ik,
    stride_gt,
    stride_gk,
    stride_nt,
    stride_nk,
    stride_pt,
    stride_pk,
    stride_mt,
    K: tl.constexpr,
    RENORMALIZED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK slots of one k: neighbours in a warp are then different tokens, which choose freely."""
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    k = tl.program_id(1).to(tl.int64)
    real = token < T
    if k == 0:
        if mask is None:
            seen = real
        else:
            seen = tl.load(mask + token * stride_mt, mask=real, other=0) != 0
        tl.atomic_add(tokens, tl.sum(seen.to(tl.int64)), sem="relaxed")

    expert, g, n, gn, top, good, fault = _slots(
        token, k, real, ids, gates, norms, peaks, mask, E,
        stride_it, stride_ik, stride_gt, stride_gk, stride_nt, stride_nk, stride_pt, stride_pk,
        stride_mt, K, RENORMALIZED,
    )  # fmt: skip
    tl.atomic_add(faults + tl.where(expert < 0, E, expert), 1, mask=fault, sem="relaxed")
    tl.atomic_add(count + expert, 1, mask=good, sem="relaxed")
    # Floats that are not negative are ordered as their bits are.
    tl.atomic_max(peak + expert, top.to(tl.int32, bitcast=True), mask=good, sem="relaxed")
    _add_exact(sums, 5 * E, expert, g, good)
    _add_exact(sums, 5 * E, expert + E, n, good)
    _add_exact(sums, 5 * E, expert + 2 * E, n * n, good)
    _add_exact(sums, 5 * E, expert + 3 * E, gn, good)
    _add_exact(sums, 5 * E, expert + 4 * E, gn * gn, good)

    if pair_sums is not None:
        for later in range(tl.program_id(1) + 1, K):
            expert2, _, _, gn2, _, good2, _ = _slots(
                token, tl.cast(later, tl.int64), real, ids, gates, norms, peaks, mask, E,
                stride_it, stride_ik, stride_gt, stride_gk, stride_nt, stride_nk, stride_pt,
                stride_pk, stride_mt, K, RENORMALIZED,
            )  # fmt: skip
            both = good & good2 & (expert != expert2)
            low = tl.minimum(expert, expert2)
            high = tl.maximum(expert, expert2)
            cell = high * (high - 1) // 2 + low
            tl.atomic_add(pair_count + cell, 1, mask=both, sem="relaxed")
            _add_exact(pair_sums, E * (E - 1) // 2, cell, gn * gn2, both)


def accumulate(
    slots: tuple[Tensor, ...],  # ids, gates, norms and peaks, each [T, K]
    mask: Tensor | None,  # tokens to count [T] bool; None: all
    accumulators: Accumulators,
    *,
    renormalized: bool = False,
) -> None:
    """Adds a layer's slots, in one launch that the host does not wait for.

    ids are int32 or int64, the others of any floating dtype. Left out are tokens outside the mask
    and slots with an id >= E. A slot with a negative id, norm or peak, or with anything NaN,
    infinite or too large to be summed, is counted in `faults` instead. renormalized: a gate is
    divided by the sum of its token's K, and 0 where that is. The caller brings the limbs back
    under 2**32 now and then: an addend moves one by less than 2**33.
    """
    T, K = slots[0].shape
    if T == 0:
        return
    given = (*slots, mask, *accumulators)
    key = slots[0].device, signature(given), renormalized
    plan = _plans.get(key, None)
    with torch.cuda.device_of(slots[0]):
        if plan is not None:
            plan.run(given)
            return
        named = arguments(slots, mask, accumulators, renormalized)
        # Views of another dtype stand for what they view.
        recorder = Recorder([named[name] for name in (*_SLOTS, "mask", *Accumulators._fields)])
        with announced():
            recorder.launch(
                statistics_kernel,
                (triton.cdiv(T, BLOCK), K),
                named,
                num_warps=4,
                enable_fp_fusion=False,  # every addend is rounded as torch rounds it
            )
    _plans.put(key, None, recorder.plan())


def arguments(
    slots: tuple[Tensor, ...],  # as above
    mask: Tensor | None,
    accumulators: Accumulators,
    renormalized: bool,
) -> dict:
    """The kernel's arguments by name."""
    fields = accumulators._asdict() | {"peak": accumulators.peak.view(torch.int32)}
    return {
        **dict(zip(_SLOTS, slots, strict=True)),
        "mask": None if mask is None else mask.view(torch.uint8),
        **fields,
        "T": slots[0].shape[0],
        "E": accumulators.count.shape[0],
        **strides("stride_it stride_ik", slots[0]),
        **strides("stride_gt stride_gk", slots[1]),
        **strides("stride_nt stride_nk", slots[2]),
        **strides("stride_pt stride_pk", slots[3]),
        **strides("stride_mt", mask),
        "K": slots[0].shape[1],
        "RENORMALIZED": renormalized,
        "BLOCK": BLOCK,
    }
