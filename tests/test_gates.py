import pytest
import torch

from reap.errors import ReapError
from reap.statistics.gates import GATES, check_gates, read_gates


def test_applied_are_the_weights():
    weights = torch.rand(3, 2, dtype=torch.float64)
    assert torch.equal(read_gates(weights, "applied"), weights)


def test_renormalized_are_shares_of_the_sum_and_zero_where_it_is_zero():
    weights = torch.tensor([[1.0, 3.0], [0.0, 0.0], [-1.0, 1.0], [-1.0, 3.0]], dtype=torch.float64)
    shares = [[0.25, 0.75], [0.0, 0.0], [0.0, 0.0], [-0.5, 1.5]]
    assert read_gates(weights, "renormalized").tolist() == shares


def test_a_row_has_its_bits_whatever_rows_are_beside_it():
    weights = torch.rand(1000, 8, dtype=torch.float64)
    alone = torch.cat([read_gates(row[None], "renormalized") for row in weights])
    assert torch.equal(read_gates(weights, "renormalized"), alone)


def test_other_names_are_refused():
    for name in GATES:
        check_gates(name)
    with pytest.raises(ReapError, match="gates is 'softmax': it must be one of applied, renorm"):
        check_gates("softmax")
