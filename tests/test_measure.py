"""Telling a module's activation by what it computes."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from reap.observation.measure import activation_of


class Gate(nn.Module):
    """What `activation_of` looks at, around any function of gate and up."""

    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True

    def __init__(self, function: Any, **parameters: float) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            setattr(self, name, value)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return self.function(*gate_up.chunk(2, -1))


@pytest.mark.parametrize(
    ("function", "parameters", "expected"),
    [
        (lambda g, u: nn.functional.silu(g) * u, {}, "silu"),
        (lambda g, u: nn.functional.gelu(g) * u, {}, "gelu"),
        (lambda g, u: nn.functional.gelu(g, approximate="tanh") * u, {}, "gelu_tanh"),
        (lambda g, u: u.clamp(-3, 3) * nn.functional.silu(g.clamp(max=3)), {"my_limit": 3.0},
         "swiglu_clamped(1.0, 3.0, 0.0)"),
        (lambda g, u: u.clamp(-3, 3) * nn.functional.silu(g.clamp(max=3)), {}, None),
        (lambda g, u: u.clamp(-300, 300) * nn.functional.silu(g), {}, None),
        (lambda g, u: nn.functional.silu(u) * g, {}, None),
        (lambda g, u: 1 / 0, {}, None),
    ],
    ids=["silu", "gelu", "gelu_tanh", "limit", "hidden limit", "large limit", "swapped", "raises"],
)  # fmt: skip
def test_activations_are_told_by_numbers(function: Any, parameters: Any, expected: Any) -> None:
    assert activation_of(Gate(function, **parameters)) == expected
