"""Counted sets of experts: the same bits in any order and partition, and exact counts."""

import copy
from collections import Counter
from itertools import combinations

import pytest
import torch
from brute import brute_force, run
from tiny import tiny_inputs, tiny_model

from reap.errors import ReapError
from reap.observation.patch import observe
from reap.statistics.setcounts import FIELDS, HASH_BITS, SetCounts, contradiction, set_hash

E, K, T = 11, 3, 600
CPU = torch.device("cpu")


def tokens(seed, count=T, width=K, experts=E):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, experts + 2, (count, width), generator=g)  # some of no expert, repeats
    return ids, torch.rand(count, generator=g) < 0.9


def plain(*parts, experts=E):
    """The multiset by a loop."""
    found: Counter[tuple[int, ...]] = Counter()
    for ids, mask in parts:
        for row, counts in zip(ids.tolist(), mask.tolist(), strict=True):
            chosen = tuple(sorted({i for i in row if 0 <= i < experts}))
            if counts and chosen:
                found[chosen] += 1
    return found


def made(*parts, limit=10_000, experts=E):
    sets = SetCounts(experts, limit, CPU)
    for part in parts:
        sets.add(*part)
    return sets


def read(sets):
    found = sets.read()
    rows = [tuple(i for i in row if i >= 0) for row in found.sets.tolist()]
    return dict(zip(rows, found.count.tolist(), strict=True))


def same(a, b):
    return all(torch.equal(a.tensor(field), b.tensor(field)) for field in FIELDS)


@pytest.mark.parametrize("experts", (1, E, 300, 40_000))
def test_against_a_loop(experts):
    parts = [tokens(1, experts=experts), tokens(2, width=5, experts=experts)]
    parts += [(torch.randint(0, min(experts, 4), (T, 2)), torch.ones(T, dtype=torch.bool))]
    sets, expected = made(*parts, experts=experts), plain(*parts, experts=experts)
    found = sets.read()
    assert read(sets) == expected and found.level == found.left_out == 0
    assert found.tokens == sum(expected.values())
    order = [tuple(i if i >= 0 else experts for i in row) for row in found.sets.tolist()]
    assert order == sorted(order)


@pytest.mark.parametrize("limit", (1, 7, 40, 10_000))
def test_order_and_partition_do_not_show(limit):
    parts = [tokens(seed, count) for seed, count in ((1, T), (2, 1), (3, 70), (4, T))]
    whole = made(*parts, limit=limit)
    backwards = SetCounts(E, limit, CPU)
    for ids, mask in parts[::-1]:
        backwards.add(ids.flip(0).flip(1), mask.flip(0))
        backwards.read()  # takes in what waits, at every step
    merged = made(parts[3], limit=limit)
    for part in (parts[1], parts[2], parts[0]):
        merged.merge(made(part, limit=limit))
    assert same(whole, backwards) and same(whole, merged)
    total = made(limit=limit)
    total.merge(made(*parts[:2], limit=limit))
    other = made(*parts[2:], limit=limit)
    total.merge(other)
    assert same(whole, total) and same(other, made(*parts[2:], limit=limit))


@pytest.mark.parametrize("limit", (1, 7, 40))
def test_beyond_the_limit_what_stays_is_exact(limit):
    parts = [tokens(1), tokens(2)]
    expected, kept = plain(*parts), made(*parts, limit=limit).read()
    padded = torch.tensor([[*row, *[E] * (K - len(row))] for row in expected])
    hashes = dict(zip(expected, set_hash(padded, E).tolist(), strict=True))
    level = next(
        level
        for level in range(HASH_BITS)
        if sum(value < 1 << (HASH_BITS - level) for value in hashes.values()) <= limit
    )
    assert kept.level == level > 0
    below = {row for row in expected if hashes[row] < 1 << (HASH_BITS - level)}
    assert read(made(*parts, limit=limit)) == {row: expected[row] for row in below}
    assert kept.left_out == sum(n for row, n in expected.items() if row not in below)


def test_the_hash_is_of_the_set_and_spread_evenly():
    ids = torch.tensor([[4, 9, 2, E], [9, E, 4, 2], [2, 4, 9, 5]])
    hashes = set_hash(ids, E)
    assert hashes[0] == hashes[1] != hashes[2]
    # Of the file's format: it must stay.
    assert set_hash(torch.tensor([[2, 4, 9]]), E).tolist() == [hashes[0]] == [1585537823]
    every = torch.tensor(list(combinations(range(24), 4)))
    hashes = set_hash(every, 24)
    assert len(hashes.unique()) > 0.999 * len(hashes)
    spread = torch.histc(hashes.double(), 16, 0, 2**32) / (len(hashes) / 16)
    assert spread.min() > 0.8 and spread.max() < 1.2


def test_sampled_sums_estimate_those_of_all():
    parts = [tokens(seed, 4000, 6, 64) for seed in range(3)]
    exact = sum(plain(*parts, experts=64).values())
    kept = made(*parts, limit=1500, experts=64).read()
    assert kept.level >= 3
    assert int(kept.count.sum()) * 2**kept.level == pytest.approx(exact, rel=0.15)


@pytest.mark.parametrize("size", (1, 2, 3, 4))
def test_groups_against_a_loop(size, monkeypatch):
    monkeypatch.setattr("reap.statistics.setcounts._GROUPS_AT_ONCE", 50)
    found = made(tokens(1), tokens(2, width=4)).read()
    expected: Counter[tuple[int, ...]] = Counter()
    for row, count in zip(found.sets.tolist(), found.count.tolist(), strict=True):
        for group in combinations([i for i in row if i >= 0], size):
            expected[group] += count
    ids, count = found.groups(size)
    rows = list(map(tuple, ids.tolist()))
    assert rows == sorted(expected)
    assert dict(zip(rows, count.tolist(), strict=True)) == expected
    dense = found.dense(size)
    for group, number in expected.items():
        assert dense[group] == dense[group[::-1]] == number
    assert dense.sum() == sum(expected.values()) * torch.arange(1, size + 1).prod()


def test_groups_of_nothing_and_too_many():
    nothing = made().read()
    ids, count = nothing.groups(3)
    assert ids.shape == (0, 3) and count.shape == (0,)
    with pytest.raises(ReapError, match="a whole number of 1 or more"):
        nothing.groups(0)
    with pytest.raises(ReapError, match="too many to number"):
        nothing.groups(20)
    with pytest.raises(ReapError, match=r"use groups\(9\)"):
        nothing.dense(9)


def test_copies_are_apart():
    sets = made(tokens(1))
    other = copy.deepcopy(sets)
    sets.add(*tokens(2))
    assert same(other, made(tokens(1))) and same(sets, made(tokens(1), tokens(2)))


def test_more_tokens_than_wait(monkeypatch):
    monkeypatch.setattr("reap.statistics.setcounts.PENDING", 64)
    parts = [tokens(seed, 50) for seed in range(5)]
    sets = made(*parts)
    assert sum(map(len, sets._waiting)) < 64
    assert read(sets) == plain(*parts)


def test_stored_and_back():
    sets = made(tokens(1), limit=40)
    state = {field: sets.tensor(field) for field in FIELDS}
    assert {f: (str(x.dtype), tuple(x.shape)) for f, x in state.items()} == {
        field: ({"I32": "torch.int32", "I64": "torch.int64"}[dtype], shape)
        for field, (dtype, shape) in sets.shapes().items()
    }
    back = SetCounts.of(E, 40, state)
    assert same(back, sets)
    back.add(*tokens(2))
    assert same(back, made(tokens(1), tokens(2), limit=40))


@pytest.mark.parametrize("model_type", ("qwen3_moe", "zaya", "longcat_flash"))
def test_of_a_model_against_brute_force(model_type):
    """Tokens that skip all experts, too: they are of no set. Pairs are those that are recorded."""
    model = tiny_model(model_type)
    inputs = tiny_inputs(model, lengths=[6, 3])
    keep = inputs["attention_mask"].flatten().bool().tolist()
    with observe(model, coalitions=100, pairs=True) as stats, brute_force(model) as truth:
        run(model, inputs)
    for name in stats.layers:
        rows: dict[int, set[int]] = {}
        for token, expert, *_ in truth[name].slots:
            if keep[token] and expert < stats[name].num_experts:
                rows.setdefault(token, set()).add(expert)
        expected = Counter(tuple(sorted(chosen)) for chosen in rows.values())
        found, pairs = stats[name].chosen, stats[name].coselected
        assert found is not None and pairs is not None
        sets = [tuple(i for i in row if i >= 0) for row in found.sets.tolist()]
        assert dict(zip(sets, found.count.tolist(), strict=True)) == expected
        assert found.tokens == len(rows) and found.level == 0
        assert torch.equal(found.dense(2), pairs - pairs.diagonal().diag())
        assert torch.equal(found.dense(1), stats[name].count)


DAMAGE = {
    "out of order": lambda s: s["coalition_sets"].copy_(s["coalition_sets"].flip(0)),
    "do not ascend": lambda s: s["coalition_sets"][-1].copy_(s["coalition_sets"][-1].flip(0)),
    "no expert": lambda s: s["coalition_sets"][0].fill_(E),
    "counts of coalitions": lambda s: s["coalition_count"][0].fill_(0),
    "numbers of coalitions": lambda s: s["coalition_about"][0].fill_(40),
    "more than 40 of 3": lambda s: s.update(coalition_sets=s["coalition_sets"].repeat(9, 1)),
    "beyond its level": lambda s: s["coalition_about"][0].add_(3),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage(what):
    sets = made((torch.randint(0, E, (T, K)), None), limit=40)
    state = {field: sets.tensor(field).clone() for field in FIELDS}
    assert contradiction(state, E, 40, T, K) is None
    DAMAGE[what](state)
    assert what in (contradiction(state, E, 40, T, K) or "")
