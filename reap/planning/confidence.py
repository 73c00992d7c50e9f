"""How sure a score is, and the difference of two, judged by groups of batches.

Tokens of one text resemble each other, and rows cut from one document do too: an error that takes
tokens for independent draws is too small, by as much as the resemblance. So the unit here is a
group g of neighbouring batches, with its sums A_g and n_g, of g*n and of tokens for `reap`:

    S = sum A_g / sum n_g      r_g = (A_g - S n_g) / sum n_g      Var S = m/(m-1) * sum r_g^2

the ratio estimator of cluster sampling (Cochran, Sampling Techniques, 3rd ed. 1977, ch. 6; the
delta method; the cluster-robust variance of Liang and Zeger, 1986), over batch means (Schmeiser,
Operations Research 30, 1982). m is Kish's effective number of groups, (sum n_g)^2 / sum n_g^2: an
expert that few groups have much of has few, whatever its tokens. There are m - 1 degrees of
freedom, hence Student's t. The difference of two experts has r_g the difference of theirs, so that
what both owe to the same text does not count, and the lesser m.

All sums here go group by group, so that their bits depend on no number of threads.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from reap.errors import ReapError
from reap.planning.criteria import CRITERIA, check_criterion

# Of criteria that are sums over tokens, or ratios of such: what is divided, and by what. Dividing
# by all tokens changes no order. `reap_l2` is a root, and has the order of its square.
RATIOS = {
    "reap": ("weighted_sum", "count"),
    "ean_mean": ("norm_sum", "count"),
    "reap_l2": ("weighted_sq_sum", "count"),
    "frequency": ("count", "tokens"),
    "ean": ("norm_sum", "tokens"),
    "weighted_ean": ("weighted_sum", "tokens"),
    "gate_mass": ("gate_sum", "tokens"),
}
FEW = 8.0  # effective groups, below which nothing is said


class Ratios(NamedTuple):
    """Of E experts, fp64: the score [E], 0 where there was nothing to divide by; what each group
    adds to it [G,E]; the effective number of groups [E]."""

    score: Tensor
    parts: Tensor
    groups: Tensor


def check_ratio_criterion(criterion: str) -> None:
    """ReapError for a criterion that there is not, or that has no standard error."""
    check_criterion(criterion)
    if criterion not in RATIOS:
        without = [name for name in CRITERIA if name not in RATIOS]
        raise ReapError(
            f"criterion {criterion} has no standard error ({' and '.join(without)} have none): "
            f"use one of {', '.join(RATIOS)}"
        )


def ratios(sums: Tensor, counts: Tensor) -> Ratios:
    """Of `sums` and `counts` [G,E] fp64 of G groups."""
    total = _sum(counts)
    some = total.clamp(min=torch.finfo(torch.float64).tiny)
    score = _sum(sums) / some
    return Ratios(score, (sums - score * counts) / some, total**2 / _sum(counts**2))


def standard_error(of: Ratios) -> Tensor:
    """Of every score, [E] fp64; NaN with fewer than FEW effective groups."""
    return _error(_sum(of.parts**2), of.groups)


def most_ahead(of: Ratios, first: Tensor, second: Tensor, tail: float) -> Tensor:
    """By how much the score of each `first` expert can be above that of each `second` one: more
    than this with a probability of `tail`. [I,J] fp64 from numbers [I] and [J]; infinite where
    either has fewer than FEW effective groups."""
    groups = torch.minimum(of.groups[first, None], of.groups[second])
    spread = torch.zeros(len(first), len(second), dtype=torch.float64)
    for one, other in zip(of.parts[:, first, None], of.parts[:, second], strict=True):
        gap = one - other
        spread.addcmul_(gap, gap)
    width = t_quantile(tail, groups - 1) * _error(spread, groups)
    return of.score[first, None] - of.score[second] + torch.nan_to_num(width, nan=math.inf)


def t_quantile(tail: float, freedom: Tensor) -> Tensor:
    """The value that Student's t with `freedom` degrees exceeds with a probability of `tail`
    (Abramowitz and Stegun 26.7.5)."""
    z = -NormalDist().inv_cdf(tail)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    value = torch.full_like(freedom, z)
    for power, term in enumerate(terms, 1):
        value = value + term / freedom**power
    return value


def _error(spread: Tensor, groups: Tensor) -> Tensor:
    groups = torch.where(groups >= FEW, groups, math.nan)
    return (groups / (groups - 1) * spread).sqrt()


def _sum(rows: Tensor) -> Tensor:
    """Over the first axis."""
    total = torch.zeros_like(rows[0])
    for row in rows:
        total += row
    return total
