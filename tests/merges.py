"""Merges for tests: of any model, and statistics with expert outputs."""

from __future__ import annotations

import random

import torch

from reap.merging.mergeplan import Group, Merge
from reap.model.info import LayerInfo, ModelInfo
from reap.statistics.stats import Statistics


def some_merge(model: ModelInfo, groups: int = 3, *, seed: int = 0) -> Merge:
    """Every layer's experts in that many groups at random, with weights of which some are zero."""
    rng = random.Random(seed)
    found = {}
    for layer in model.layers:
        ids = list(range(layer.num_experts))
        rng.shuffle(ids)
        members = sorted(sorted(ids[g::groups]) for g in range(groups))
        weights = [[rng.choice((0, 1, 3, 40)) for _ in group[1:]] for group in members]
        found[layer.name] = tuple(
            Group(tuple(group), (2, *rest)) for group, rest in zip(members, weights, strict=True)
        )
    return Merge(model=model, method="random", groups=found)


def a_model(experts: int = 6, *layers: str) -> ModelInfo:
    infos = tuple(LayerInfo(name, experts, 2) for name in layers or ("a", "b"))
    return ModelInfo("m", "tiny", "f" * 64, None, infos)


def counted(
    model: ModelInfo, counts: dict[str, list[int]], means: torch.Tensor | None = None
) -> Statistics:
    """Statistics in which each expert was chosen so often, and put out these means [E,H]."""
    stats = Statistics(model, versions={"torch": "2"}, outputs=means is not None)
    for name, numbers in counts.items():
        ids = torch.repeat_interleave(torch.arange(len(numbers)), torch.tensor(numbers))[:, None]
        ones = torch.ones(ids.shape)
        sums = None if means is None else means * torch.tensor(numbers)[:, None]
        both = None if sums is None else torch.stack([sums, sums])
        stats.update(name, ids, ones, ones, ones, output_sums=both)
    return stats
