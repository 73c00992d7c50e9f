"""The order in which the down projection walks over its columns, decided by counting bytes.

Expert by expert, each row of the sums [T, H] fp32 is added to K times, and where the cache does not
hold them all it comes from memory and goes back each time. Slab by slab of W columns, [T, W] stays
in the cache, and the inner tensor is read again for each slab: that pays where W is more than about
a quarter of I. Between two visits to a sum more of the inner tensor passes by than the cache holds,
so the sums stay only where loads of the operands can say that they are the first to go.
"""

from __future__ import annotations

from reap_kernels.contract import Call

# Of the cache: the sums of a slab at most; the rest is for the rows and weights that pass by.
SUMS_SHARE = 2 / 3
# Of the bytes: a count knows nothing of what a longer walk costs, so it has to save this much.
LEAST_SAVING = 1 / 6


def down_bytes(call: Call, width: int, cache: int) -> int:
    """Bytes between memory and a cache of `cache` bytes, of the down projection in slabs of `width`
    columns: weights once, the inner tensor once per slab, and 8 for each sum: once each where a
    slab of them stays in the cache, else once for each slot."""
    T, S, H, I = call.T, call.T * call.K, call.H, call.I  # noqa: E741
    size = call.hidden_states.element_size()
    stays = 4 * T * width <= SUMS_SHARE * cache
    slabs = -(-H // width)
    return size * (call.E * H * I + slabs * S * I) + 8 * H * (T if stays else S)


def slab_tiles(call: Call, block_n: int, cache: int) -> int:
    """Column tiles per slab, of tiles of block_n columns: all of them where slabs do not pay."""
    tiles = -(-call.H // block_n)
    fitting = int(SUMS_SHARE * cache) // (4 * max(1, call.T) * block_n)
    if call.deterministic or not 0 < fitting < tiles:
        return tiles
    even = -(-tiles // -(-tiles // fitting))
    whole = down_bytes(call, call.H, cache)
    return even if down_bytes(call, even * block_n, cache) <= (1 - LEAST_SAVING) * whole else tiles
