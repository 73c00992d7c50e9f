"""What is measured of numbers, tokens and logits, each from a published definition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor

PERIOD, REPEATS, LEAST = 32, 4, 24


class Interval(NamedTuple):
    """A mean or share with its 95% interval; `low` and `high` are NaN where none can be told."""

    middle: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean of independent draws and Student's interval around it."""
    middle = math.fsum(values) / len(values)
    if len(values) < 2:
        return Interval(middle, math.nan, math.nan)
    spread = math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (len(values) - 1))
    half = float(student.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values))
    return Interval(middle, middle - half, middle + half)


def wilson(successes: int, trials: int) -> Interval:
    """A share of `trials`, with Wilson's score interval (J. Am. Stat. Assoc. 22, 1927), which holds
    for few and for none."""
    z = 1.959963984540054
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    half /= 1 + z * z / trials
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def distinct(rows: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams of all rows, as a share of their n-grams (Li et al., arXiv 1510.03055)."""
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats, 0 to log 2, between the distributions that the logits
    [...,V] stand for. [...] fp32"""
    p, q = first.float().log_softmax(-1), second.float().log_softmax(-1)
    middle = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1))


def loops(row: Sequence[int]) -> bool:
    """Whether a text ends in a loop: for some period of at most PERIOD tokens its last tokens, of
    REPEATS periods and at least LEAST tokens, repeat with it."""
    for period in range(1, PERIOD + 1):
        tail = max(REPEATS * period, LEAST)
        if tail > len(row):
            continue
        start = len(row) - tail
        if all(row[i] == row[i - period] for i in range(start + period, len(row))):
            return True
    return False


def kendall(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau of two score lists without ties: pairs in the same order less pairs in the
    other, as a share."""
    pairs = [(i, j) for j in range(len(first)) for i in range(j)]
    signs = [(first[i] - first[j]) * (second[i] - second[j]) for i, j in pairs]
    return sum((s > 0) - (s < 0) for s in signs) / len(pairs)


def overlap(first: set[int], second: set[int]) -> float:
    """Common members as a share of all (Jaccard); 1 for two empty sets."""
    return len(first & second) / len(first | second) if first | second else 1.0


def spread(vectors: Tensor, weights: Tensor | None = None) -> float:
    """Variance of vectors [N,H] around their mean, summed over the directions; with weights [N], of
    that many vectors each."""
    if weights is None:
        weights = torch.ones(len(vectors))
    share = (weights.double() / weights.double().sum())[:, None]
    vectors = vectors.double()
    return float((share * (vectors - (share * vectors).sum(0)) ** 2).sum())
