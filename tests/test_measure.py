"""Telling a module's activation by what it computes, and whether the op computes what it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reap.model.compat import Layout
from reap.observation.measure import _exact, accurate, activation_of, fused, state_of


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_waits_once(dtype: torch.dtype, monkeypatch: Any) -> None:
    """On the meta device, where nothing but the last line has anything to read."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    reads: list[Tensor] = []
    found = [1.0, 0.1, 0.1]

    def tolist(self: Tensor) -> list[float]:
        reads.append(self)
        return found

    monkeypatch.setattr(Tensor, "tolist", tolist)
    weights = [empty(4, 12, 8), empty(4, 8, 6), empty(4, 12), empty(4, 8)]
    call = (empty(5, 8), empty(5, 2, dtype=torch.int64), empty(5, 2))
    layout = Layout(gated=True, biased=True, transposed=False, interleaved=True, post_norm=False)
    assert accurate(weights, layout, lambda x, *_: x, *call, activation="silu")
    found[2] = 0.2
    assert not accurate(weights, layout, lambda x, *_: x, *call, activation="silu")
    found[0] = float("nan")
    assert accurate(weights, layout, lambda x, *_: x, *call, activation="silu")
    assert [list(read.shape) for read in reads] == [[3]] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exact_output_leaves_slots_without_expert_out(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(4, 12, 8, dtype=dtype), torch.randn(4, 8, 6, dtype=dtype)]
    hidden, gates = torch.randn(5, 8, dtype=dtype), torch.rand(5, 2)
    ids = torch.tensor([[0, 4], [7, 1], [2, 3], [3, 0], [4, 4]])
    gates[0, 1] = torch.nan
    layout = Layout(gated=True, biased=False, transposed=False, interleaved=False, post_norm=False)
    exact = _exact(weights, layout, hidden, ids, gates, "silu")
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    weights, hidden = [weight.to(wide) for weight in weights], hidden.to(wide)
    expected = fused(weights, layout, hidden, ids, gates, backend="reference").out
    assert exact.dtype == wide
    torch.testing.assert_close(exact, expected)


def test_modules_of_one_state_compute_the_same() -> None:
    def function(g: Tensor, u: Tensor) -> Tensor:
        return g * u

    def changed(**given: Any) -> Gate:
        gate = Gate(function, limit=7.0)
        for name, value in given.items():
            setattr(gate, name, value)
        return gate

    weight = nn.Parameter(torch.ones(1))
    plain = state_of(changed(), ("weight",))
    assert state_of(changed(weight=weight), ("weight",)) == plain
    shared = nn.Module()
    differing = [
        changed(limit=7.5),
        changed(limit=None),
        changed(function=lambda g, u: g * u),
        changed(_apply_gate=lambda gate_up: gate_up),
        changed(weight=weight, other=weight),
        changed(act_fn=nn.SiLU()),
        changed(act_fn=nn.GELU()),
        changed(act_fn=nn.GELU("tanh")),
        changed(act_fn=nn.PReLU()),
        changed(act_fn=nn.PReLU()),
        changed(act_fn=shared, limit=True),
    ]
    states = {plain, *(state_of(gate, ("weight",)) for gate in differing)}
    assert len(states) == 1 + len(differing)
    assert state_of(changed(act_fn=nn.SiLU())) == state_of(changed(act_fn=nn.SiLU()))
