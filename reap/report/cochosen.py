"""Which experts tokens choose together, where statistics have pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reap.report.evidence import Cut, Layer

SHOWN = 4  # layers that have a figure
LISTED = 15  # pairs in the table


@dataclass(frozen=True)
class Pair:
    """Two experts of one layer, and how many tokens chose both: found, and by proportion."""

    at: int  # the layer's number
    experts: tuple[int, int]
    tokens: int
    expected: float


@dataclass(frozen=True)
class Cochosen:
    """Of the layers with these numbers, the lifts [E,E] of experts in ascending order of score, and
    how many of them go; of all layers the most striking pairs."""

    layers: list[int]
    lifts: list[Tensor]
    dropped: list[int]
    pairs: list[Pair]


def cochosen(layers: Sequence[Layer], cut: Cut) -> Cochosen | None:
    """None where no token chose two experts."""
    found: list[tuple[float, Pair]] = []
    lifts: dict[int, Tensor] = {}
    spaced = max(1, math.ceil(len(layers) / SHOWN))
    for at, layer in enumerate(layers):
        together = layer.sums.coselected
        if together is None or not (expected := proportional(together)).any():
            continue
        together = together.double().fill_diagonal_(0)
        surprise = ((together - expected) / expected.clamp(min=1).sqrt()).triu(1)
        for place in surprise.flatten().topk(min(LISTED, surprise.numel())).indices.tolist():
            i, j = divmod(place, len(together))
            if surprise[i, j] > 0:
                pair = Pair(at, (i, j), int(together[i, j]), float(expected[i, j]))
                found.append((float(surprise[i, j]), pair))
        if at % spaced == 0:
            gone = set(cut.dropped[at])
            # The dropped first, also where groups or protection kept a lower score.
            order = sorted(
                range(len(together)),
                key=lambda e, at=at, gone=gone: (e not in gone, float(cut.scores[at][e]), e),  # type: ignore[misc]
            )
            lift = torch.where(expected > 0, together / expected, math.nan)
            lifts[at] = lift[order][:, order]
    if not found:
        return None
    found.sort(key=lambda each: -each[0])
    return Cochosen(
        list(lifts),
        list(lifts.values()),
        [len(cut.dropped[at]) for at in lifts],
        [pair for _, pair in found[:LISTED]],
    )


def proportional(together: Tensor) -> Tensor:
    """As many pairs as in `together` [E,E], of which the diagonal is how often each was chosen,
    spread in proportion to that: c n_i n_j, with c so that the sums agree. [E,E] fp64, diagonal 0.
    """
    chosen = together.diagonal().double()
    product = (chosen[:, None] * chosen).fill_diagonal_(0)
    pairs = together.double().fill_diagonal_(0).sum()
    return product * (pairs / product.sum()) if pairs else torch.zeros_like(product)
