"""Sums in fixed point against fractions."""

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reap.statistics.fixed import LIMIT, FixedSum, contradiction

SHAPE = (3, 2, 5)
UNIT = Fraction(1, 1 << 62)


def exact(addends):
    """Each addend without what is below the unit, towards zero; then summed."""
    total = [Fraction(0)] * addends[0].numel()
    for values in addends:
        for i, value in enumerate(values.flatten().tolist()):
            total[i] += int(Fraction(value) / UNIT) * UNIT
    return total


def fractions_of(total):
    whole, fraction = total.canonical().unbind(1)
    pairs = zip(whole.flatten().tolist(), fraction.flatten().tolist(), strict=True)
    return [Fraction(a) + b * UNIT for a, b in pairs]


def summed(addends):
    total = FixedSum(SHAPE, "cpu")
    for values in addends:
        total.add(values)
    return total


def drawn(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    size = torch.randint(-70, 40, SHAPE, generator=g).double()
    return (torch.randn(SHAPE, generator=g, dtype=torch.float64) * 2**size).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_are_exact(dtype):
    addends = [drawn(seed, dtype) for seed in range(40)]
    total = summed(addends)
    assert fractions_of(total) == exact(addends)
    assert contradiction(total.canonical()) is None
    for read, true in zip(total.read().flatten().tolist(), exact(addends), strict=True):
        assert abs(Fraction(read) - true) <= abs(true) * Fraction(1, 1 << 52)


def test_small_negative_sums_keep_their_digits():
    total = summed([torch.full(SHAPE, -1e-15), torch.full(SHAPE, 1.0), torch.full(SHAPE, -1.0)])
    assert abs(total.read() / float(torch.tensor(-1e-15)) - 1).max() < 1e-3  # of its 4,611 units
    assert (summed([torch.full(SHAPE, -3.5)]).read() == -3.5).all()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(order=st.permutations(range(6)), cut=st.integers(0, 6))
def test_any_order_and_partition_gives_the_same_bits(order, cut):
    addends = [drawn(seed) for seed in range(6)]
    parts = [summed([addends[i] for i in some]) for some in (order[:cut], order[cut:])]
    total = FixedSum(SHAPE, "cpu")
    for part in parts:
        total.merge(part)
    assert torch.equal(total.canonical(), summed(addends).canonical())
    assert torch.equal(FixedSum.from_canonical(total.canonical(), SHAPE).read(), total.read())


def test_the_largest_addends_have_room():
    below = torch.full(SHAPE, LIMIT, dtype=torch.float64).nextafter(torch.zeros(1).double())
    total = summed([below])
    for _ in range(18):  # doubles, 2**18 addends in all
        total.merge(FixedSum.from_canonical(total.canonical(), SHAPE))
    assert fractions_of(total) == [Fraction(below.flatten()[0].item()) * 2**18] * below.numel()
    negative = summed([-below])
    for _ in range(18):
        negative.merge(FixedSum.from_canonical(negative.canonical(), SHAPE))
    total.merge(negative)
    assert not total.canonical().any()


def test_what_was_read_is_not_written_to():
    total = summed([drawn(0)])
    kept = total.canonical()
    before = kept.clone()
    other = FixedSum.from_canonical(kept, SHAPE)
    for _, more in itertools.product(range(2), (total, other)):
        more.add(drawn(1))
    assert torch.equal(kept, before)
    assert fractions_of(other) == exact([drawn(0), drawn(1), drawn(1)])


@pytest.mark.parametrize("value", [-1, 1 << 62])
def test_a_fraction_beyond_one_is_found(value):
    stored = summed([drawn(0)]).canonical()
    stored[1, 1, 0, 2] = value
    assert contradiction(stored) == "a fraction beyond one"
