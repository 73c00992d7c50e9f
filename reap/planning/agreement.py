"""How far two rankings of one layer's experts agree, and the sets that they drop."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from reap.errors import ReapError
from reap.model.info import LayerInfo
from reap.planning.criteria import rank
from reap.planning.plan import select


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's rho of two scores [E] of the same experts: the correlation of their ranks, of
    equals the mean rank. NaN where one of them ranks nothing: fewer than two experts, all equal."""
    return float(rank_correlations([first, second])[0, 1])


def rank_correlations(scores: Sequence[Tensor]) -> Tensor:
    """`rank_correlation` of each of N scores [E] with each, [N,N] fp64."""
    ranks = torch.stack([_ranks(each) for each in scores])
    ranks -= ranks.mean(1, keepdim=True)
    product = ranks @ ranks.T
    size = product.diagonal().sqrt()
    found = (product / (size * size[:, None])).clamp(-1, 1)
    return torch.where(product.diagonal() > 0, found, math.nan)


def overlap(first: Collection[int], second: Collection[int]) -> float:
    """The share that two sets of dropped experts have in common, of the larger one: 1 where they
    are the same, also where both are empty. By chance it is about the share of experts dropped."""
    larger = max(len(first), len(second))
    return len(set(first) & set(second)) / larger if larger else 1.0


def overlaps(sets: Sequence[Collection[int]]) -> Tensor:
    """`overlap` of each of N sets with each, [N,N] fp64."""
    has = torch.zeros(len(sets), 1 + max(map(max, filter(None, sets)), default=0)).double()
    for row, members in zip(has, sets, strict=True):
        row[list(members)] = 1
    larger = torch.maximum(has.sum(1), has.sum(1)[:, None])
    return torch.where(larger > 0, has @ has.T / larger, 1.0)


def dropped(layer: LayerInfo, scores: Tensor, keep: int) -> tuple[int, ...]:
    """The experts, ascending, that go where the best `keep` by scores [E] stay, chosen as
    `make_plan` does. ReapError for a score that cannot be ranked."""
    try:
        ranked = rank(scores)
    except ReapError as error:
        raise ReapError(f"layer {layer.name}: {error}") from error
    if layer.n_group == 1:
        return tuple(sorted(ranked[keep:]))
    stays = set(select(layer, ranked, keep, ()))
    return tuple(expert for expert in range(layer.num_experts) if expert not in stays)


def _ranks(scores: Tensor) -> Tensor:
    """From 0, the lowest, [E] fp64."""
    _, place, size = scores.double().unique(return_inverse=True, return_counts=True)
    last = size.cumsum(0) - 1
    return (last.double() - (size - 1).double() / 2)[place]
