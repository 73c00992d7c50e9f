"""Sums over pairs, live, stored and of both kinds together: the same bits."""

from itertools import combinations, product

import pytest
import torch

from reap.statistics.exact import LIMBS
from reap.statistics.pairs import Pairs

E, T, K = 7, 25, 3
CPU = torch.device("cpu")


def slots(seed):
    g = torch.Generator().manual_seed(seed)
    expert = torch.randint(0, E, (T, K), generator=g)
    weighted = torch.randn(T, K, generator=g, dtype=torch.float64).mul(9).exp()
    return expert, weighted, torch.rand(T, K, generator=g) < 0.8


def made(*seeds, kind="live"):
    pairs = Pairs(E, CPU)
    for seed in seeds:
        pairs.add(*slots(seed))
    return pairs if kind == "live" else Pairs.of(E, pairs.count, pairs.sums.canonical())


def same(a, b):
    return torch.equal(a.count, b.count) and torch.equal(a.sums.canonical(), b.sums.canonical())


def test_against_a_loop():
    count, sums = torch.zeros(E, E, dtype=torch.int64), torch.zeros(E, E, dtype=torch.float64)
    expert, weighted, counted = slots(1)
    for t in range(T):
        for i, j in combinations(range(K), 2):
            a, b = int(expert[t, i]), int(expert[t, j])
            if counted[t, i] and counted[t, j] and a != b:
                for place in ((a, b), (b, a)):
                    count[place] += 1
                    sums[place] += weighted[t, i] * weighted[t, j]
    pairs = made(1)
    assert torch.equal(pairs.square(pairs.count, torch.zeros(E, dtype=torch.int64)), count)
    read = pairs.square(pairs.sums.read(), torch.zeros(E, dtype=torch.float64))
    torch.testing.assert_close(read, sums, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("mine", "theirs"), list(product(("live", "stored"), repeat=2)))
def test_merged(mine, theirs):
    one, other = made(1, kind=mine), made(2, 3, kind=theirs)
    one.merge(other)
    assert same(one, made(1, 2, 3)) and same(other, made(2, 3))
    one.add(*slots(4))
    assert same(one, made(1, 2, 3, 4)) and same(other, made(2, 3))


@pytest.mark.parametrize("kind", ("live", "stored"))
def test_nothing_is_a_neutral_element_and_no_alias(kind):
    nothing, some = Pairs(E, CPU), made(1, kind=kind)
    some.merge(nothing)
    assert same(some, made(1))
    nothing.merge(some)
    nothing.add(*slots(2))
    assert same(some, made(1)) and same(nothing, made(1, 2))


def test_nothing_takes_no_memory():
    huge = Pairs(100_000, CPU)  # limbs of 800 GB
    assert huge.sums.cells == 4_999_950_000
    assert huge.sums.canonical(slice(3, 5)).tolist() == [[0] * LIMBS] * 2
