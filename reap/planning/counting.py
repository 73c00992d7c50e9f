"""How many experts stay: what was asked for, what routers and servers can do with it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction

from reap.errors import ReapError
from reap.model.info import LayerInfo

Ratio = float | str | Fraction | Decimal


def kept_counts(
    layers: Iterable[LayerInfo],
    *,
    ratio: Ratio | None = None,
    keep: int | None = None,
    multiple_of: int = 1,
) -> list[int]:
    """How many experts of each layer stay, as `make_plan` describes its options; ReapError, which
    names the nearest count that works, where a layer's router could not do with that many."""
    if (ratio is None) == (keep is None):
        raise ReapError(
            "say how much to prune with exactly one of ratio and keep: ratio=0.5 or keep=8, say"
        )
    share = None if ratio is None else share_of(ratio)
    check_whole(keep=keep, multiple_of=multiple_of)
    return [_kept_count(layer, share, keep, multiple_of) for layer in layers]


def check_whole(**numbers: int | None) -> None:
    """ReapError for one that is given and is no whole number of 1 or more."""
    for name, number in numbers.items():
        if number is not None and (type(number) is not int or number < 1):
            raise ReapError(f"{name} is {number!r}: it must be a whole number of 1 or more")


def share_of(ratio: Ratio) -> Fraction:
    """The ratio as its shortest decimal text reads, not as its nearest binary fraction. ReapError
    for what is no number from 0 to less than 1."""
    # A bounded exponent: the plan file of a stranger must not cost a billion digits.
    text = str(ratio)
    if re.fullmatch(
        r"\d{1,40}/0*[1-9]\d{0,39}|(\d{1,40}|\d{0,40}\.\d{1,40})(e-?\d{1,3})?", text, re.I
    ):
        share = Fraction(text)
        if share < 1:
            return share
    raise ReapError(f"ratio is {text[:40]}: it must be a number of at least 0 and less than 1")


def _kept_count(
    layer: LayerInfo, share: Fraction | None, keep: int | None, multiple_of: int
) -> int:
    """How many experts of this layer stay, from exactly one of `share` to drop and `keep`."""
    E = layer.num_experts
    wanted = keep or 0
    step = multiple_of
    if share is not None:
        wanted = E - math.floor(E * share)
        step = math.lcm(multiple_of, layer.n_group)
    count = -(-wanted // step) * step
    fault = count_fault(layer, count)
    if fault is None:
        return count
    allowed = [n for n in range(multiple_of, E, multiple_of) if not count_fault(layer, n)]
    if not allowed:
        whole = " but all of them" if E % multiple_of == 0 else ""
        raise ReapError(
            f"layer {layer.name}: no multiple of {multiple_of} works for {E} experts{whole}"
        )
    nearest = min(allowed, key=lambda n: (abs(n - wanted), -n))
    rounded = f", {wanted} rounded up to a multiple of {step}" if count != wanted else ""
    raise ReapError(
        f"layer {layer.name}: cannot keep {count} of {E} experts{rounded}: {fault}; "
        f"the nearest that works is keep {nearest} or ratio {ratio_text(E - nearest, E)}"
    )


def count_fault(layer: LayerInfo, count: int) -> str | None:
    """Why this many survivors would break the layer's router, or None."""
    if count > layer.num_experts:
        return "there are not that many"
    if count < layer.top_k:
        return f"its router picks {layer.top_k} per token"
    if count % layer.n_group:
        return f"its {layer.n_group} router groups must keep equal numbers"
    per_group = count // layer.n_group
    if per_group < layer.min_per_group:
        return f"a router group needs {layer.min_per_group} experts, it would keep {per_group}"
    if layer.topk_group * per_group < layer.top_k:
        return (
            f"its router picks {layer.top_k} from {layer.topk_group} groups, "
            f"which would hold {layer.topk_group * per_group}"
        )
    return None


def ratio_text(dropped: int, experts: int) -> str:
    """The shortest decimal ratio that drops exactly this many."""
    for digits in range(1, 20):
        scale = 10**digits
        text = str(Decimal(-(-dropped * scale // experts)) / scale)
        if math.floor(experts * Fraction(text)) == dropped:
            return text
    raise AssertionError(f"no decimal between {dropped}/{experts} and the next count")


def split_note(layer: LayerInfo, kept: int) -> str | None:
    """What a server that spreads experts evenly over ranks loses by this count, or None."""
    experts = layer.num_experts
    if kept == experts or kept & (kept - 1) == 0:
        return None  # as before, or a power of two
    ways = min(8, experts & -experts)  # ranks, a power of two, that could share the experts before
    left = kept & -kept
    if left >= ways:
        return None
    step = math.lcm(ways, layer.n_group)
    better = math.ceil(kept / step) * step
    hint = f"; try multiple_of={step}, which keeps {better}"
    if better >= experts:  # which drops nothing
        fewer = better - step
        hint = f"; try keep={fewer}" if fewer and not count_fault(layer, fewer) else ""
    if kept > 2 and all(kept % d for d in range(2, math.isqrt(kept) + 1)):
        return f"kept {kept} per layer is prime: cannot be split over expert-parallel ranks{hint}"
    if left == 1:
        return f"kept {kept} per layer is odd: cannot be split over 2 expert-parallel ranks{hint}"
    return (
        f"kept {kept} per layer splits over {left} expert-parallel ranks, "
        f"{experts} did over {ways}{hint}"
    )
