import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reap.errors import ReapError
from reap.statistics import exact
from reap.statistics.exact import LIMIT, ExactSum, in_range

UNIT = Fraction(1, 2**320)
addends = st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: abs(x) < LIMIT)
# Normal magnitudes too: uniform bit patterns hardly ever overlap, so they hardly ever carry.
tame = st.floats(min_value=-1e6, max_value=1e6)


def total(values: list[float], cells: list[int] | None = None, size: int = 1) -> ExactSum:
    result = ExactSum(size)
    cell = torch.tensor(cells if cells is not None else [0] * len(values), dtype=torch.int64)
    result.add(cell, torch.tensor(values, dtype=torch.float64))
    return result


def dropped_below_unit(value: float) -> Fraction:
    return math.floor(Fraction(value) / UNIT) * UNIT


@settings(deadline=None)
@given(st.lists(st.one_of(addends, tame), max_size=40))
def test_sum_is_exact_and_rounded_once(values):
    want = sum((dropped_below_unit(value) for value in values), Fraction(0))
    result = total(values)
    assert result.integers() == [want / UNIT]
    assert result.read().tolist() == [float(want)]


@settings(deadline=None)
@given(st.lists(tame, max_size=40))
def test_agrees_with_fsum(values):
    assert total(values).read().item() == pytest.approx(math.fsum(values), rel=1e-15, abs=1e-90)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.one_of(addends, tame)), max_size=30),
    st.randoms(use_true_random=False),
)
def test_any_order_partition_and_merge_gives_the_same_bits(items, random):
    want = total([v for _, v in items], [c for c, _ in items], size=3)
    parts = [ExactSum(3) for _ in range(4)]
    shuffled = random.sample(items, len(items))
    while shuffled:
        n = random.randint(1, len(shuffled))
        chunk, shuffled = shuffled[:n], shuffled[n:]
        cell = torch.tensor([c for c, _ in chunk])
        values = torch.tensor([v for _, v in chunk], dtype=torch.float64)
        random.choice(parts).add(cell, values)
    random.shuffle(parts)
    for part in parts[1:]:
        parts[0].merge(part)
    assert torch.equal(parts[0].canonical(), want.canonical())


@settings(deadline=None)
@given(st.lists(st.one_of(addends, tame), max_size=10))
def test_canonical_form_round_trips(values):
    rows = total(values).canonical()
    assert torch.equal(ExactSum.from_canonical(rows).canonical(), rows)


def test_opposite_addends_cancel_to_the_canonical_zero():
    assert not total([1e300 * 2.0**-800, -(1e300 * 2.0**-800), 3.0, -3.0]).canonical().any()


def test_lost_in_fp64_but_not_here():
    assert total([1e60, 1.0, -1e60, 2.0**-200]).read().item() == 1.0
    assert total([2.0**60, 1.0, -(2.0**60)]).read().item() == 1.0


def test_carries_before_a_limb_can_overflow(monkeypatch):
    monkeypatch.setattr(exact, "MAX_PENDING", 4)
    result = ExactSum(1)
    carried = []
    carry = ExactSum._carry

    def counted(self):
        carried.append(1)
        carry(self)

    monkeypatch.setattr(ExactSum, "_carry", counted)
    for _ in range(5):
        result.add(torch.zeros(3, dtype=torch.int64), torch.full((3,), -0.1, dtype=torch.float64))
        assert result._pending <= 4
    assert len(carried) == 4
    assert result.integers() == [int(Fraction(-0.1) / UNIT) * 15]


def test_merged_limbs_keep_their_room():
    parts = [total([0.1] * 1000) for _ in range(2)]
    parts[0].merge(parts[1])
    assert parts[0]._limbs.max() < 2**33 and parts[0]._pending == 1
    assert parts[0].integers() == [int(Fraction(0.1) / UNIT) * 2000]


def test_more_addends_than_one_cache_chunk():
    n = 3 * exact._CPU_CHUNK + 7
    values = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = ExactSum(1)
    result.add(torch.zeros(n, dtype=torch.int64), values)
    assert result.read().item() == math.fsum(values.tolist())


def test_range():
    just_below = math.nextafter(LIMIT, 0.0)
    inside, outside = [0.0, just_below, -just_below], [LIMIT, -LIMIT, math.inf, math.nan]
    probe = torch.tensor(inside + outside, dtype=torch.float64)
    assert in_range(probe).tolist() == [True] * 3 + [False] * 4
    assert total([just_below, -just_below, just_below]).read().item() == just_below


def test_a_sum_beyond_the_last_limb_is_an_error():
    result = total([math.nextafter(LIMIT, 0.0)])
    result._limbs[-1, 0] = 1 << 31  # as 2**31 such addends would leave it
    with pytest.raises(ReapError, match=r"exceeds 2\*\*319"):
        result.canonical()


def test_no_cells():
    empty = total([], [], size=0)
    assert empty.read().shape == (0,) and empty.canonical().shape == (0, exact.LIMBS)
