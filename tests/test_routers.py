"""What is shared by checkpoints and modules of routers: tables of names, tables of tokens."""

from __future__ import annotations

import re

import numpy as np
import pytest

from reap.model.routers import ROUTER, SHARED, remapped

KEPT = (1, 2, 5)


def test_remapped_tables_spread_the_orphans() -> None:
    table = np.array([[0, 1], [1, 5], [3, 4], [0, 4]])
    new = remapped(table, KEPT)
    assert new[1].tolist() == [0, 2] and new[0, 1] == 0
    for row in new:
        assert len(set(row)) == 2 and all(0 <= e < 3 for e in row), "no token gets an expert twice"
    many = remapped(np.zeros((999, 1), dtype=np.int64), KEPT)
    assert np.bincount(many[:, 0]).tolist() == [333, 333, 333]


@pytest.mark.parametrize(
    ("tail", "axis"),
    [
        ("gate.weight", 0),
        ("router.gate.weight", 0),
        ("gate.e_score_correction_bias", 0),
        ("e_score_correction_bias", 0),
        ("gate.moe_statics.e_score_correction_bias", 1),
        ("gate.router_mlp.out_proj.weight", 0),  # behind a part of the router that is shared
        ("gate.router_mlp.fc1.weight", None),
        ("shared_expert_gate.weight", None),
        ("shared_experts.gate.weight", None),
    ],
)
def test_the_axis_of_the_experts(tail: str, axis: int | None) -> None:
    found = next((a for pattern, a in ROUTER if re.fullmatch(pattern, tail)), None)
    assert found == axis and (axis is not None or SHARED.fullmatch(tail))
