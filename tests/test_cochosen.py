"""Which experts tokens choose together."""

from __future__ import annotations

import torch
from madeup import madeup

from reap.model.info import LayerInfo, ModelInfo
from reap.report.cochosen import LISTED, SHOWN, cochosen, proportional
from reap.report.evidence import gather
from reap.statistics.stats import Statistics


def test_by_proportion() -> None:
    """Counts that are proportional to how often each is chosen are their own expectation."""
    chosen = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    together = chosen[:, None] * chosen
    expected = proportional(together.clone().diagonal_scatter(chosen))
    assert torch.allclose(expected, together.fill_diagonal_(0))
    assert not proportional(torch.diag(chosen)).any()


def friends() -> Statistics:
    """One layer, in which 0 and 5 go together, beside every other pair once."""
    model = ModelInfo("made_up", "m", "f" * 64, None, (LayerInfo("m.0.experts", 6, 2),))
    stats = Statistics(model, pairs=True)
    index = torch.combinations(torch.arange(6), 2)
    index = torch.cat([index, torch.tensor([[0, 5]] * 20)])
    norms = 1.0 + index.float()
    stats.update("m.0.experts", index, torch.full(index.shape, 0.5), norms, norms)
    return stats


def test_friends_are_found() -> None:
    seen = gather(friends(), {})
    found = cochosen(seen.layers, seen.first)
    assert found is not None
    best = found.pairs[0]
    assert (best.at, best.experts, best.tokens) == (0, (0, 5), 21)
    # 0 and 5 are chosen 25 times each, the others 5 times; 35 pairs in all.
    products = 25 * 25 + 2 * 4 * 25 * 5 + 6 * 5 * 5
    assert abs(best.expected - 25 * 25 * 35 / products) < 1e-9
    (lift,) = found.lifts
    order = [*seen.first.dropped[0], *(e for e in range(6) if e not in seen.first.dropped[0])]
    places = order.index(0), order.index(5)
    assert abs(float(lift[places]) - 21 / best.expected) < 1e-9
    assert found.dropped == [3] and lift.diagonal().isnan().all()


def test_some_layers_are_shown_and_all_are_listed() -> None:
    seen = gather(madeup(9, 8, pairs=True), {})
    found = cochosen(seen.layers, seen.first)
    assert found is not None and len(found.layers) <= SHOWN and len(found.pairs) == LISTED
    surprise = [(p.tokens - p.expected) / p.expected**0.5 for p in found.pairs]
    assert surprise == sorted(surprise, reverse=True) and surprise[-1] > 0
    assert {pair.at for pair in found.pairs} - set(found.layers)


def test_without_pairs() -> None:
    seen = gather(madeup(), {})
    assert cochosen(seen.layers, seen.first) is None
    seen = gather(madeup(top_k=1, pairs=True), {})
    assert cochosen(seen.layers, seen.first) is None
