"""Statistics -> one score per expert, by any criterion; how sure a score is, and how sure a cut is.

Higher is more worth keeping. An expert that no token was routed to scores 0 by every criterion.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from os import PathLike

import torch
from torch import Tensor

from reap.errors import ReapError
from reap.statistics.exact import FRACTION_BITS
from reap.statistics.layerstats import LayerStatistics
from reap.statistics.stats import Statistics


def reap(layer: LayerStatistics) -> Tensor:
    """Mean of g*n over the expert's tokens (arXiv 2510.13999, eq. 9). [E] fp64"""
    return _mean(layer.weighted_sum, layer)


def frequency(layer: LayerStatistics) -> Tensor:
    """Number of tokens routed to the expert. [E] fp64"""
    return layer.count.double()


def ean(layer: LayerStatistics) -> Tensor:
    """Sum of n: expert activation norm. [E] fp64"""
    return layer.norm_sum


def ean_mean(layer: LayerStatistics) -> Tensor:
    """Mean of n over the expert's tokens. [E] fp64"""
    return _mean(layer.norm_sum, layer)


def weighted_ean(layer: LayerStatistics) -> Tensor:
    """Sum of g*n, EASY-EP's score. [E] fp64"""
    return layer.weighted_sum


def gate_mass(layer: LayerStatistics) -> Tensor:
    """Sum of g. [E] fp64"""
    return layer.gate_sum


def reap_l2(layer: LayerStatistics) -> Tensor:
    """Root of the mean of (g*n)^2 over the expert's tokens. [E] fp64"""
    return _mean(layer.weighted_sq_sum, layer).sqrt()


def peak(layer: LayerStatistics) -> Tensor:
    """Largest magnitude that the expert put out. [E] fp64"""
    return layer.peak.double()


def random(layer: LayerStatistics, seed: int = 0) -> Tensor:
    """Uniform in (0, 1), a hash of seed, layer and expert: the same everywhere. [E] fp64"""
    keys = (f"{seed}/{layer.name}/{expert}".encode() for expert in range(layer.num_experts))
    words = [int.from_bytes(hashlib.sha256(key).digest()[:6], "big") for key in keys]
    scores = (torch.tensor(words, dtype=torch.float64) + 0.5) / 2**48
    return torch.where(layer.count > 0, scores, 0.0)


CRITERIA: dict[str, Callable[[LayerStatistics], Tensor]] = {
    criterion.__name__: criterion
    for criterion in (
        reap,
        frequency,
        ean,
        ean_mean,
        weighted_ean,
        gate_mass,
        reap_l2,
        peak,
        random,
    )
}


def saliency(
    stats: Statistics | str | PathLike[str], criterion: str = "reap", *, seed: int = 0
) -> dict[str, Tensor]:
    """The score of every expert, {layer: [E] fp64}, higher is better. `seed` is for "random" only.

    ReapError for an unknown criterion, and when a layer saw no token.
    """
    check_criterion(criterion)
    return {name: layer_scores(layer, criterion, seed) for name, layer in observed(stats)}


def layer_scores(layer: LayerStatistics, criterion: str, seed: int = 0) -> Tensor:
    """`saliency` of one layer, [E] fp64."""
    return random(layer, seed) if criterion == "random" else CRITERIA[criterion](layer)


def standard_errors(
    stats: Statistics | str | PathLike[str], criterion: str = "reap"
) -> dict[str, Tensor]:
    """The standard error of every score, {layer: [E] fp64}, tokens taken as independent draws.

    Means (reap, ean_mean): sqrt(s^2/n), s^2 the sample variance over the expert's n tokens; NaN for
    n < 2. Sums (frequency, ean, weighted_ean): sqrt(T s^2), s^2 the sample variance over all T
    tokens, with zero for those routed elsewhere; for frequency that is the binomial's T/(T-1) n (1
    - n/T). NaN for T < 2. gate_mass, reap_l2, peak and random: NaN, their squares are not among the
    statistics. Neighbouring tokens resemble each other, so the true error is larger.
    """
    check_criterion(criterion)
    return {name: layer_errors(layer, criterion) for name, layer in observed(stats)}


def layer_errors(layer: LayerStatistics, criterion: str) -> Tensor:
    """`standard_errors` of one layer, [E] fp64."""
    moments = {
        "reap": ("weighted_sum", "weighted_sq_sum"),
        "weighted_ean": ("weighted_sum", "weighted_sq_sum"),
        "ean": ("norm_sum", "norm_sq_sum"),
        "ean_mean": ("norm_sum", "norm_sq_sum"),
    }
    count = layer.count.tolist()
    if criterion == "frequency":
        first = second = [n << FRACTION_BITS for n in count]
    elif criterion in moments:
        first, second = (layer.exact(field) for field in moments[criterion])
    else:
        return torch.full((len(count),), math.nan, dtype=torch.float64)
    mean = criterion in ("reap", "ean_mean")
    draws = count if mean else [layer.tokens] * len(count)
    values = map(partial(_standard_error, mean=mean), draws, first, second)
    return torch.tensor(list(values), dtype=torch.float64)


def cut_confidence(
    stats: Statistics | str | PathLike[str],
    kept: Mapping[str, Iterable[int]],
    criterion: str = "reap",
) -> dict[str, float]:
    """Per layer, how sure the cut is: (weakest kept - strongest dropped) / standard error of this
    gap.

    About 2 and above: another sample of the same text would hardly swap the two. Negative where
    protection or router groups kept an expert in spite of its score. NaN where nothing is dropped
    or a standard error does not exist.
    """
    scores, errors = saliency(stats, criterion), standard_errors(stats, criterion)
    return {name: gap(score, errors[name], kept[name]) for name, score in scores.items()}


def gap(score: Tensor, error: Tensor, kept: Iterable[int]) -> float:
    """`cut_confidence` of one layer, from its scores and standard errors [E] fp64."""
    stays = set(kept)
    dropped = [expert for expert in range(len(score)) if expert not in stays]
    if not stays or not dropped:
        return math.nan
    values = score.tolist()
    weakest = min(stays, key=values.__getitem__)
    strongest = max(dropped, key=values.__getitem__)
    difference = values[weakest] - values[strongest]
    spread = math.hypot(float(error[weakest]), float(error[strongest]))
    if spread == 0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / spread


def under_sampled(
    stats: Statistics | str | PathLike[str], minimum: int = 100
) -> dict[str, tuple[int, ...]]:
    """Experts with fewer than `minimum` tokens, ascending, for layers that have any."""
    few = {
        name: tuple((layer.count < minimum).nonzero().flatten().tolist())
        for name, layer in observed(stats)
    }
    return {name: experts for name, experts in few.items() if experts}


def super_experts(stats: Statistics | str | PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Experts with extreme outputs, ascending, for layers that have any.

    A peak strictly above both the 99.5th percentile (interpolated linearly) and a tenth of the
    largest, over all experts of all layers.
    """
    return extreme({name: layer.peak.double() for name, layer in observed(stats)})


def extreme(peaks: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """`super_experts` by the peaks [E] fp64 of every layer."""
    everything = torch.cat(list(peaks.values())).sort().values
    place = 0.995 * (len(everything) - 1)
    below, above = everything[math.floor(place)], everything[math.ceil(place)]
    percentile = below + (above - below) * (place - math.floor(place))
    threshold = torch.maximum(percentile, everything[-1] / 10)
    found = {
        name: tuple((peak > threshold).nonzero().flatten().tolist()) for name, peak in peaks.items()
    }
    return {name: experts for name, experts in found.items() if experts}


def rank(scores: Tensor) -> list[int]:
    """Experts from the highest score to the lowest; of equals the lower id comes first.

    ReapError for a NaN or infinite score: a sort would put it anywhere.
    """
    for expert in (~scores.isfinite()).nonzero().flatten().tolist():
        raise ReapError(
            f"expert {expert} has the score {float(scores[expert])}: it cannot be ranked"
        )
    return scores.argsort(descending=True, stable=True).tolist()


def check_criterion(criterion: str) -> None:
    """ReapError for one that there is not."""
    if criterion not in CRITERIA:
        raise ReapError(f"criterion is {criterion!r}: it must be one of {', '.join(CRITERIA)}")


def observed(
    stats: Statistics | str | PathLike[str],
) -> Iterable[tuple[str, LayerStatistics]]:
    """All layers by name, ReapError for one without a single token: its scores would be made of
    nothing."""
    stats = Statistics.of(stats)
    if not stats.layers:
        raise ReapError(f"model {stats.model.name} has no MoE layers")
    for name in stats.layers:
        layer = stats.layer(name)
        if not layer.tokens:
            raise ReapError(f"layer {name} saw no tokens: calibrate on more text before scoring")
        yield name, layer


def _mean(total: Tensor, layer: LayerStatistics) -> Tensor:
    return total / layer.count.clamp(min=1)


def _standard_error(draws: int, first: int, second: int, *, mean: bool) -> float:
    """Of the mean or the sum of `draws` numbers, from their sum and sum of squares in units of
    2**-320.

    In integers: the difference of E[x^2] and E[x]^2 loses nothing.
    """
    if draws < 2:
        return math.nan
    # n^2 * (E[x^2] - E[x]^2) in units of 2**-640; squares rounded one by one may leave it below
    # zero.
    spread = max(0, ((draws * second) << FRACTION_BITS) - first * first)
    parts = draws * draws * (draws - 1) if mean else draws - 1
    return math.sqrt(spread / (parts << (2 * FRACTION_BITS)))
