"""Sums of products of logits: exact, of what was rounded on its own."""

from fractions import Fraction

import pytest
import torch

from reap.errors import ReapError
from reap.statistics.logitsums import LogitSums, cells, contradiction

E, T = 5, 60
CPU = torch.device("cpu")


def logits(seed, count=T):
    g = torch.Generator().manual_seed(seed)
    size = torch.tensor([1e-3, 1, 30, 4000, 1e-7])
    values = (torch.rand(count, E, generator=g) * 2 - 1) * size
    return values, torch.rand(count, generator=g) < 0.8


def made(*parts):
    sums = LogitSums(E, CPU)
    for part in parts:
        sums.add("a layer", *part)
    return sums


def test_against_exact_arithmetic():
    values, mask = logits(1)
    square = made((values, mask)).read()
    rows = [
        [*(Fraction(round(Fraction(x) * 2**18), 2**18) for x in row), Fraction(1)]
        for row, counts in zip(values.tolist(), mask.tolist(), strict=True)
        if counts
    ]
    for i in range(E + 1):
        for j in range(E + 1):
            assert float(square[i, j]) == float(sum(row[i] * row[j] for row in rows))
    plain = values[mask].double()
    torch.testing.assert_close(square[:E, :E], plain.T @ plain, rtol=1e-4, atol=0.1)


def test_order_and_partition_do_not_show(monkeypatch):
    (a, m), (b, n) = logits(1), logits(2, 7)
    whole = made((a, m), (b, n)).tensor()
    assert torch.equal(made((b.flip(0), n.flip(0)), (a.flip(0), m.flip(0))).tensor(), whole)
    assert torch.equal(made((torch.cat([a, b]), torch.cat([m, n]))).tensor(), whole)
    monkeypatch.setattr("reap.statistics.logitsums._TOKENS", 3)
    merged = made((b, n))
    merged.merge(made((a, m)))
    assert torch.equal(merged.tensor(), whole)


def test_what_does_not_count_may_be_anything():
    values, mask = logits(1)
    spoilt = torch.where(mask[:, None], values, torch.nan)
    sums = made((spoilt, mask))
    sums.check("a layer")
    assert torch.equal(sums.tensor(), made((values, mask)).tensor())


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -5000.0))
def test_what_cannot_be_added_is_named(value):
    values, _ = logits(1)
    values[3, 2] = value
    with pytest.raises(ReapError, match="layer a layer, expert 2: a logit of the router is NaN"):
        made((values, None)).check("a layer")


def test_unknown_from_the_first_call_without_them():
    sums = made(logits(1), (None, None), logits(2))
    assert sums.lost and sums.read() is None
    other = made(logits(1))
    other.merge(sums)
    assert other.read() is None
    with pytest.raises(ReapError, match="logits are"):
        made((torch.zeros(3, E + 1), None))


def test_stored_and_back():
    sums = made(logits(1))
    back = LogitSums.of(E, sums.tensor())
    assert torch.equal(back.read(), sums.read()) and len(back.tensor()) == cells(E)
    tokens = int(logits(1)[1].sum())
    state = {"logit_products": sums.tensor()}
    assert contradiction(state, tokens) is None
    assert "other than its tokens" in (contradiction(state, tokens + 1) or "")
    back = LogitSums.of(E, None)
    assert back.read() is None
