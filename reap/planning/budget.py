"""One budget of experts for all layers: how many each layer keeps, by scores of the whole model.

Experts of different layers are comparable only by a rule, since norms grow with depth: a score

- `raw` is what the criterion says;
- `mean` is divided by the mean of its layer: 1 is an average expert of any layer;
- `share` is divided by the sum of its layer: the part of the layer's total that the expert is of.
  Where all layers have equally many experts, this orders them as `mean` does; where not, an average
  expert of a small layer is worth more than one of a large layer.

Every layer first gets its floor. What is left goes, a step at a time, to the layer whose next
experts score most. As a layer's next experts never score more than those before, no other split of
the budget has a larger sum of scores.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from reap.errors import ReapError
from reap.model.info import LayerInfo
from reap.planning.counting import Ratio, check_whole, count_fault, ratio_text, share_of

if TYPE_CHECKING:
    from torch import Tensor

SCOPES = ("layer", "global")
NORMALIZE = ("raw", "mean", "share")


def check_scope(scope: str, normalize: str | None, **across: int | None) -> None:
    """ReapError for a scope or rule that there is not, and for what only one scope has."""
    if scope not in SCOPES:
        raise ReapError(f"scope is {scope!r}: it must be one of {', '.join(SCOPES)}")
    if normalize is not None and normalize not in NORMALIZE:
        raise ReapError(f"normalize is {normalize!r}: it must be one of {', '.join(NORMALIZE)}")
    given: dict[str, object] = {**across, "normalize": normalize}
    odd = next((name for name, value in given.items() if value is not None), None)
    if scope == "layer" and odd:
        raise ReapError(f'{odd} is of one budget for all layers: pass scope="global" too')


def normalized(scores: Mapping[str, Tensor], rule: str) -> dict[str, Tensor]:
    """Scores [E] of every layer, made comparable by `rule`. ReapError for a layer whose scores are
    all zero, where it divides by them."""
    if rule == "raw":
        return dict(scores)
    found = {}
    for name, score in scores.items():
        total = float(score.sum())
        if not total > 0 or not math.isfinite(total):
            raise ReapError(
                f"layer {name}: its scores add up to {total:g}, by which nothing can be divided: "
                "normalize by raw, or calibrate on more text"
            )
        found[name] = score / (total if rule == "share" else total / len(score))
    return found


def global_counts(
    layers: Sequence[LayerInfo],
    ranked: Mapping[str, Sequence[float]],
    *,
    ratio: Ratio | None = None,
    keep: int | None = None,
    total: int | None = None,
    multiple_of: int = 1,
    least: int | None = None,
    protected: Mapping[str, Sequence[int]] | None = None,
) -> list[int]:
    """How many experts of each layer stay. `ranked`: each layer's scores in the order in which its
    experts stay.

    Exactly one of `ratio` (floor of the share of all experts goes, rounded up to what multiples
    allow), `keep` (experts per layer on average, exactly) and `total` (in all layers, exactly) is
    the budget. Each layer keeps a multiple of `multiple_of` and of its router's groups, at least
    `least`, what its router needs and its `protected` ones. ReapError, which names the nearest
    budget that can be met, for one that cannot.
    """
    check_whole(keep=keep, total=total, multiple_of=multiple_of, least=least)
    if sum(x is not None for x in (ratio, keep, total)) != 1:
        raise ReapError("say how much to prune with exactly one of ratio, keep and total")
    steps = [math.lcm(multiple_of, layer.n_group) for layer in layers]
    spans = [
        _span(layer, step, max(least or 1, _needed(layer, (protected or {}).get(layer.name, ()))))
        for layer, step in zip(layers, steps, strict=True)
    ]
    counts = [low for low, _ in spans]
    budget = _budget(layers, steps, spans, ratio, keep, total)
    left = budget - sum(counts)
    scores = [ranked[layer.name] for layer in layers]
    heap: list[tuple[float, int]] = []

    def offer(i: int) -> None:
        """Let a layer's next experts take part, if it may keep more."""
        if counts[i] + steps[i] <= spans[i][1]:
            gain = math.fsum(scores[i][counts[i] : counts[i] + steps[i]]) / steps[i]
            heapq.heappush(heap, (-gain, i))  # of equals the earlier layer's

    for i in range(len(layers)):
        offer(i)
    while left and heap:
        _, i = heapq.heappop(heap)
        if steps[i] <= left:
            counts[i] += steps[i]
            left -= steps[i]
            offer(i)
    if left:
        raise ReapError(
            f"{budget:,} experts cannot be kept where layers keep multiples of "
            f"{', '.join(map(str, sorted({*steps})))}: the nearest that works is total "
            f"{budget - left:,}"
        )
    return counts


def staying(layer: LayerInfo, ranked: Sequence[int], protected: Iterable[int]) -> list[int]:
    """A layer's experts in the order in which they stay: the protected, then the best; where a
    router has groups, the best of each group, then the second of each, and so on."""
    stays = set(protected)
    order = [e for e in ranked if e in stays] + [e for e in ranked if e not in stays]
    size = layer.num_experts // layer.n_group
    groups = [[e for e in order if e // size == group] for group in range(layer.n_group)]
    return [expert for row in zip(*groups, strict=True) for expert in row]


def _needed(layer: LayerInfo, protected: Iterable[int]) -> int:
    """So many experts must stay that all protected ones do."""
    size = layer.num_experts // layer.n_group
    held = Counter(expert // size for expert in protected)
    return max(held.values(), default=0) * layer.n_group


def _span(layer: LayerInfo, step: int, least: int) -> tuple[int, int]:
    """The fewest and the most experts that the layer may keep."""
    allowed = [n for n in range(step, layer.num_experts + 1, step) if not count_fault(layer, n)]
    low = next((n for n in allowed if n >= least), None)
    if low is None:
        raise ReapError(
            f"layer {layer.name}: no multiple of {step} from {least} to its {layer.num_experts} "
            "experts works for its router: ask for fewer at least, or another multiple"
        )
    return low, allowed[-1]


def _budget(
    layers: Sequence[LayerInfo],
    steps: Sequence[int],
    spans: Sequence[tuple[int, int]],
    ratio: Ratio | None,
    keep: int | None,
    total: int | None,
) -> int:
    experts = sum(layer.num_experts for layer in layers)
    step = math.gcd(*steps)
    if ratio is not None:
        wanted = experts - math.floor(experts * share_of(ratio))
        budget = -(-wanted // step) * step
    else:
        budget = total if total is not None else (keep or 0) * len(layers)
        wanted = budget
    low, high = (sum(ends) for ends in zip(*spans, strict=True))
    rounded = f", {wanted:,} rounded up to a multiple of {step}" if budget != wanted else ""
    if budget < low or budget > high:
        end, what = (low, "at least") if budget < low else (high, "at most")
        raise ReapError(
            f"cannot keep {budget:,} of {experts:,} experts{rounded}: together the layers keep "
            f"{what} {end:,}: the nearest that works is total {end} or ratio "
            f"{ratio_text(experts - end, experts)}"
        )
    if budget % step:
        near = min(high, -(-budget // step) * step)
        raise ReapError(
            f"cannot keep exactly {budget:,} experts where every layer keeps a multiple of {step}: "
            f"the nearest that works is total {near}"
        )
    return budget
