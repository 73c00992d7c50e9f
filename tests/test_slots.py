import pytest
import torch
from slots import K, slots

from reap.errors import ReapError
from reap.statistics.slots import check_slots


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        (0, torch.zeros(8, dtype=torch.int64), r"top_k_index is \[8\] int64"),
        (0, torch.zeros(8, K), r"top_k_index is \[8, 3\] float32"),
        (1, torch.zeros(7, K), r"top_k_weights is \[7, 3\] float32"),
        (2, torch.zeros(8, K, dtype=torch.int64), r"norms is \[8, 3\] int64"),
        (3, torch.zeros(8, K + 1), r"peaks is \[8, 4\] float32"),
        (4, torch.ones(8), r"mask is \[8\] float32: it must be \[8\] bool"),
        (4, torch.ones(7, dtype=torch.bool), r"mask is \[7\] bool"),
    ],
)
def test_bad_arguments(argument, value, message):
    arguments = [*slots(8), None]
    arguments[argument] = value
    with pytest.raises(ReapError, match=message):
        check_slots(*arguments)


def test_what_may_be_there():
    ids, *given = slots(8)
    weights, norms, peaks = (x.bfloat16() for x in given)
    check_slots(ids.int(), weights, norms, peaks, torch.ones(8, dtype=torch.bool))
    check_slots(ids, weights, norms, peaks, None)
