"""How far rankings and dropped sets agree."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reap.errors import ReapError
from reap.model.info import LayerInfo
from reap.planning.agreement import dropped, overlap, overlaps, rank_correlation, rank_correlations
from reap.planning.criteria import rank
from reap.planning.plan import select

scores = st.lists(st.integers(0, 5).map(float), min_size=6, max_size=6)


def mean_ranks(values: list[float]) -> list[float]:
    """From the definition: those below, and half of the others that are equal."""
    return [
        sum(other < one for other in values) + (sum(other == one for other in values) - 1) / 2
        for one in values
    ]


@given(scores, scores)
def test_rank_correlation_is_that_of_mean_ranks(one: list[float], other: list[float]) -> None:
    ranks = torch.tensor([mean_ranks(one), mean_ranks(other)], dtype=torch.float64)
    a, b = ranks - ranks.mean(1, keepdim=True)
    expected = float(a @ b / (a.norm() * b.norm()))
    found = rank_correlation(torch.tensor(one), torch.tensor(other))
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_rank_correlation_of_orders() -> None:
    ascending = torch.arange(10.0)
    assert rank_correlation(ascending, ascending.exp()) == pytest.approx(1)
    assert rank_correlation(ascending, -ascending) == pytest.approx(-1)
    assert math.isnan(rank_correlation(ascending, torch.ones(10)))
    assert math.isnan(rank_correlation(torch.ones(1), torch.ones(1)))
    table = rank_correlations([ascending, -ascending, torch.ones(10)])
    assert table.isnan().tolist() == [[False, False, True]] * 2 + [[True] * 3]


def test_overlap() -> None:
    assert overlap({1, 2}, {1, 2}) == 1 == overlap((), ())
    assert overlap({1, 2}, {2, 3}) == 0.5
    assert overlap({1, 2, 3, 4}, {1}) == 0.25 and overlap({1}, set()) == 0
    sets: list[set[int]] = [{1, 2}, {2, 3, 4}, set(), {0}, set()]
    assert overlaps(sets).tolist() == [[overlap(a, b) for b in sets] for a in sets]
    assert overlaps([(), ()]).tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("groups", [1, 4])
def test_dropped_is_what_a_plan_would_drop(groups: int) -> None:
    layer = LayerInfo("m.0.experts", 16, 2, n_group=groups, topk_group=groups)
    values = torch.tensor([(7 * e) % 5 for e in range(16)], dtype=torch.float64)
    kept = select(layer, rank(values), 8, ())
    assert dropped(layer, values, 8) == tuple(sorted({*range(16)} - {*kept}))
    assert len(kept) == 8 and dropped(layer, values, 16) == ()


def test_what_cannot_be_ranked_names_its_layer() -> None:
    layer = LayerInfo("m.0.experts", 2, 1)
    with pytest.raises(ReapError, match="layer m.0.experts: expert 1 has the score nan"):
        dropped(layer, torch.tensor([1.0, math.nan]), 1)
