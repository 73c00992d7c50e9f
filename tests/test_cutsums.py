"""Sums at cuts: exact, whoever adds them and in whatever order layers ran."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from test_stability import APART, Run

from reap.planning.confidence import RATIOS
from reap.runs.cutsums import ByCut, Exact
from reap.statistics.stats import Statistics


def filled(batches: int, seed: int = 0) -> Statistics:
    run = Run(APART, seed=seed)
    for number in range(batches):
        run.batch("code" if number % 2 else "prose")
    return run.stats


@pytest.mark.parametrize("criterion", list(RATIOS))
def test_read(criterion: str) -> None:
    """What is read is what the statistics say; parts add up."""
    one, other = filled(3), filled(4, seed=1)
    exact = Exact(one.model, criterion)
    both = exact.read([one, other])
    assert (both == exact.read([one]) + exact.read([other])).all()
    whole = one + other
    for row, field in zip(exact.rounded(both), RATIOS[criterion], strict=True):
        for layer in whole.layers:
            found = row[exact.place(layer)]
            own = whole[layer]
            expected = own.tokens if field == "tokens" else getattr(own, field).double()
            assert torch.equal(found, torch.as_tensor(expected).double().expand(len(found)))
    again = exact.parsed(exact.written(both))
    assert (again == both).all() and (exact.parsed(exact.written(-both)) == -both).all()


def test_text_that_is_none() -> None:
    exact = Exact(filled(1).model, "reap")
    good = exact.written(exact.none())
    for text in [
        "",
        "AAAA",
        good[:-8],
        5,
        None,
        Exact(Run([1.0] * 4).model, "reap").written(np.full((2, 8), 1, dtype=object)),
    ]:
        with pytest.raises((ValueError, TypeError)):
            exact.parsed(text)


def test_layers_in_any_order() -> None:
    """Of batches that run through some layers ahead of others, and through one twice."""
    draw = random.Random(0)
    plain, mixed = Run(APART).stats, Run(APART).stats
    exact = Exact(plain.model, "reap")
    by_cut = ByCut(exact, mixed, exact.read([filled(2)]))
    before = exact.read([filled(2)])
    rows = []
    for number in range(12):
        for layer in plain.layers:
            ids = torch.rand(24, 8).topk(2).indices
            rows.append((number, layer, (ids, torch.ones(24, 2), torch.rand(24, 2), ids.float())))
    draw.shuffle(rows)
    for number, layer, slots in rows:
        mixed.update(layer, *slots)
        by_cut.ran(number // 4 * 4 + 4)
    for cut in (4, 8, 12):
        for number, layer, slots in rows:
            if cut - 4 <= number < cut:
                plain.update(layer, *slots)
        assert (by_cut.take(cut) == before + exact.read([plain])).all()
    assert (by_cut.take() == before + exact.read([mixed])).all()
