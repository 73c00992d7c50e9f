"""Slots sorted by expert: every index bit-exact against a sort by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_routing import route
from torch._subclasses.fake_tensor import FakeTensorMode


def by_hand(ids, num_experts):
    flat = [min(i, num_experts) for row in ids for i in row]
    order = sorted(range(len(flat)), key=lambda slot: flat[slot])  # Python's sort is stable
    counts = [flat.count(expert) for expert in range(num_experts)]
    offsets = [sum(counts[:expert]) for expert in range(num_experts + 1)]
    return order, offsets, counts


def check(top_k_index, num_experts):
    routing = route(top_k_index, num_experts)
    assert all(array.dtype == torch.int64 for array in routing)
    expected = by_hand(top_k_index.tolist(), num_experts)
    assert tuple(array.tolist() for array in routing) == expected


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("ids", "num_experts"),
    [
        ([[2, 0], [1, 2], [0, 2]], 3),  # every expert hit
        ([[3, 3], [3, 3]], 5),  # one expert has every slot, twice per token
        ([[4, 0], [9, 4], [1, 0]], 4),  # sentinels E and above keep their order
        ([[7], [7]], 2),  # nothing but sentinels
        ([[0, 1, 2]], 3),  # K = E
        ([[0]], 1),
    ],
)
def test_by_hand(ids, num_experts, dtype):
    check(torch.tensor(ids, dtype=dtype), num_experts)


def test_no_token():
    check(torch.empty(0, 4, dtype=torch.int64), 6)


def test_largest_ids_are_sentinels():
    check(torch.tensor([[2**31 - 1, 0]], dtype=torch.int32), 1)
    check(torch.tensor([[2**63 - 1, 0]], dtype=torch.int64), 1)


def test_strides_are_honoured_and_the_input_is_left_alone():
    ids = torch.randint(0, 9, (5, 14))
    view = ids.T[::2]
    before = ids.clone()
    check(view, 7)
    assert torch.equal(ids, before)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_ids(data):
    num_experts = data.draw(st.integers(1, 9))
    row = st.lists(st.integers(0, num_experts + 3), min_size=3, max_size=3)
    ids = data.draw(st.lists(row, min_size=1, max_size=20))
    check(torch.tensor(ids), num_experts)


def test_nothing_depends_on_the_data_on_the_host():
    """On a GPU each such read would be a wait; a fake tensor has no data to read."""
    with FakeTensorMode():
        routing = route(torch.zeros(6, 2, dtype=torch.int64), 5)
    assert [tuple(array.shape) for array in routing] == [(12,), (6,), (5,)]
