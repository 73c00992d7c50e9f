"""The costs of pairs, against their definitions written out token by token."""

from __future__ import annotations

import math

import pytest
import torch

from reap.merging.pairerrors import (
    Records,
    agreement,
    costs_of,
    often,
    records_of,
    shared_costs,
    together,
)


def slots(
    tokens: int = 7, K: int = 3, H: int = 5, experts: int = 6, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(K, tokens, H, generator=generator, dtype=torch.float64)
    ids = torch.stack(
        [torch.randperm(experts, generator=generator)[:K] for _ in range(tokens)]
    )  # [T,K]
    return outputs, ids, torch.rand(tokens, K, generator=generator)


def test_every_pair_of_slots() -> None:
    outputs, ids, gates = slots(experts=600)  # of so many that no two tokens share a pair
    found = records_of(outputs, ids, gates, 600)
    assert len(found.apart) == 7 * 3
    pairs = map(tuple, found.experts.tolist())
    at = dict(zip(pairs, zip(*found[1:], strict=True), strict=True))
    assert len(at) == 7 * 3
    for t in range(7):
        f = {int(ids[t, k]): outputs[k, t] for k in range(3)}
        g = {int(ids[t, k]): float(gates[t, k]) for k in range(3)}
        whole = sum(g[e] * f[e] for e in f)
        for i in f:
            for j in f:
                if i >= j:
                    continue
                gate, norm, apart, shared = at[i, j]
                assert gate.tolist() == [g[i], g[j]]
                torch.testing.assert_close(norm, torch.stack([f[i].norm(), f[j].norm()]))
                torch.testing.assert_close(apart, (f[i] - f[j]).norm() ** 2)
                for its, e in zip(shared, (i, j), strict=True):
                    total = sum(g.values())
                    rest = sum(g[x] * f[x] for x in f if x != e) * total / (total - g[e])
                    torch.testing.assert_close(its, (whole - rest).norm() ** 2)


def test_slots_that_are_no_pair() -> None:
    """No expert, an expert twice, no gate at all; and of others an only gate has nobody to go
    to."""
    outputs, _, _ = slots(4, 2)
    ids = torch.tensor([[0, 6], [2, 2], [1, 0], [3, 1]])
    gates = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.0, 0.0], [1.0, 0.0]])
    found = records_of(outputs, ids, gates, 6)
    assert found.experts.tolist() == [[1, 3]] and found.gates.tolist() == [[0.0, 1.0]]
    gone = outputs[0, 3].square().sum()
    torch.testing.assert_close(found.shared[0], torch.stack([0 * gone, gone]))


def test_costs_by_their_definitions() -> None:
    generator = torch.Generator().manual_seed(1)
    g = torch.rand(50, 2, generator=generator, dtype=torch.float64)
    g[:10, 0] = 0  # tokens that chose one of the two
    n = torch.rand(50, 2, generator=generator, dtype=torch.float64) + 1
    d = torch.rand(50, generator=generator, dtype=torch.float64)
    rows = list(zip(g.tolist(), n.tolist(), d.tolist(), strict=True))

    def mean(values: list[float]) -> float:
        return math.fsum(values) / len(values)

    r = [a / (a + b) for (a, b), _, _ in rows]
    alpha = mean(r)
    spread = mean([(x - alpha) ** 2 for x in r])
    merge = mean(
        [
            (a + b) ** 2 * (x - alpha) ** 2 * apart
            for x, ((a, b), _, apart) in zip(r, rows, strict=True)
        ]
    )
    predicted = mean([(a + b) ** 2 for (a, b), _, _ in rows]) * spread * mean(d.tolist())
    found = costs_of(g, n, d)
    assert found.tokens == 50
    for value, truth in (
        (found.alpha, alpha),
        (found.spread, spread),
        (found.merge, merge),
        (found.merge_predicted, predicted),
        (found.prune[0], mean([a * a * apart for (a, _), _, apart in rows])),
        (found.prune[1], mean([b * b * apart for (_, b), _, apart in rows])),
        (found.prune_bound[0], mean([(a * sum(norms)) ** 2 for (a, _), norms, _ in rows])),
        (found.prune_bound[1], mean([(b * sum(norms)) ** 2 for (_, b), norms, _ in rows])),
    ):
        assert value == pytest.approx(truth, rel=1e-12)


def test_the_bound_holds_and_a_constant_share_merges_for_nothing() -> None:
    outputs, ids, gates = slots(40, 2)
    found = records_of(outputs, ids, gates, 6)
    for of in often(found, least=1, most=99).values():
        costs = costs_of(of.gates, of.norms, of.apart)
        assert all(x <= y for x, y in zip(costs.prune, costs.prune_bound, strict=True))
    half = costs_of(torch.full((9, 2), 0.5), torch.ones(9, 2), torch.rand(9))
    assert half.merge == half.merge_predicted == half.spread == 0 and half.alpha == 0.5


def test_the_pairs_chosen_most_often() -> None:
    pairs = [(2, 3)] * 3 + [(0, 1)] * 2 + [(0, 5)] * 3 + [(1, 4)]
    rows = torch.arange(len(pairs), dtype=torch.float64)
    two = rows[:, None].expand(-1, 2)
    records = Records(torch.tensor(pairs), two, two, rows, two)
    assert list(often(records, least=1, most=9)) == [(0, 1), (0, 5), (1, 4), (2, 3)]
    assert list(often(records, least=2, most=9)) == [(0, 1), (0, 5), (2, 3)]
    assert list(often(records, least=1, most=1)) == [(0, 5)]
    assert often(records, least=1, most=9)[0, 5].apart.tolist() == [5, 6, 7]
    assert shared_costs(often(records, least=1, most=9)[0, 5]) == (6, 6)
    again = together([records, records])
    assert len(again.apart) == 18


def test_agreement() -> None:
    assert agreement([1, 2, 3], [10, 20, 30]) == 1
    assert agreement([3, 2, 1], [10, 20, 30]) == 0
    assert agreement([1, 2, 3], [10, 30, 20]) == pytest.approx(2 / 3)
    assert agreement([1, 1, 2], [10, 20, 30]) == pytest.approx(2.5 / 3)  # a tie is half right
    assert agreement([1, 2, 3], [5, 5, 6]) == 1  # of two equal ones there is nothing to say
    assert agreement([1, 2], [5, 5]) is None and agreement([1], [2]) is None
