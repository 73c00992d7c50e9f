"""Statistics of an eager model by brute force: one slot at a time, in fp64, sharing no code with us.

    with brute_force(model) as truth: model(**inputs)
    truth["model.layers.0.mlp.experts"]  # a `Truth` with every field of LayerStatistics
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Truth:
    """Slots of one layer: token number, expert, gate, norm and peak, in the order of the calls."""

    num_experts: int
    tokens: int = 0
    slots: list[tuple[int, int, float, float, float]] = field(default_factory=list)

    def fields(self, *, renormalized: bool = False, keep: Tensor | None = None) -> dict[str, Tensor]:
        """Every field of LayerStatistics over the tokens where `keep` [tokens] bool is True."""
        E = self.num_experts
        sums = {
            name: torch.zeros(E, dtype=torch.float64)
            for name in ("gate_sum", "norm_sum", "norm_sq_sum", "weighted_sum", "weighted_sq_sum")
        }
        result: dict[str, Any] = {
            **sums,
            "count": torch.zeros(E, dtype=torch.int64),
            "peak": torch.zeros(E, dtype=torch.float64),
            "coselected": torch.zeros(E, E, dtype=torch.int64),
            "coweighted": torch.zeros(E, E, dtype=torch.float64),
        }
        rows: dict[int, list[tuple[int, float]]] = {}
        totals: dict[int, float] = {}
        for token, _, gate, _, _ in self.slots:
            totals[token] = totals.get(token, 0.0) + gate
        for token, expert, gate, norm, peak in self.slots:
            if expert >= E or gate == 0 or (keep is not None and not keep[token]):
                continue
            g = gate / totals[token] if renormalized else gate
            for name, value in zip(sums, (g, norm, norm**2, g * norm, (g * norm) ** 2), strict=True):
                result[name][expert] += value
            result["count"][expert] += 1
            result["peak"][expert] = max(result["peak"][expert], peak)
            rows.setdefault(token, []).append((expert, g * norm))
        for row in rows.values():
            for i, a in row:
                for j, b in row:
                    result["coselected"][i, j] += 1
                    result["coweighted"][i, j] += a * b
        return result


def slot_output(module: nn.Module, x: Tensor, expert: int) -> Tensor:
    """f(x) [H] of one expert for one token x [H], in x's dtype, through the module's own gate."""
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, up_name)[expert], module.down_proj[expert]
    if module.is_transposed:
        up, down = up.T, down.T
    y = up.to(x) @ x
    if module.has_bias:
        y = y + getattr(module, f"{up_name}_bias")[expert].to(x)
    y = (module._apply_gate if module.has_gate else module.act_fn)(y[None])[0].to(x)
    y = down.to(x) @ y
    if module.has_bias:
        y = y + module.down_proj_bias[expert].to(x)
    if module.has_post_expert_norm:
        norm = copy.deepcopy(module.post_expert_norm).to(x.dtype)
        y = norm(y[None])[0].to(x)
    return y


def count_slots(truth: Truth, ids: Tensor, gates: Tensor, output: Any) -> None:
    """Add one call; `output(token, expert)` is f(x) in fp64."""
    for t, (experts, weights) in enumerate(zip(ids.tolist(), gates.double().tolist(), strict=True)):
        for expert, gate in zip(experts, weights, strict=True):
            y = output(t, expert) if expert < truth.num_experts else torch.zeros(1)
            norm, peak = float(y.norm()), float(y.abs().max())
            truth.slots.append((truth.tokens + t, expert, gate, norm, peak))
    truth.tokens += len(ids)


@contextmanager
def brute_force(model: nn.Module) -> Iterator[dict[str, Truth]]:
    """Collect a `Truth` for every module on the experts interface that the model calls."""
    truths: dict[str, Truth] = {}
    handles = []
    for name, module in model.named_modules():
        if not hasattr(module, "is_concatenated"):
            continue

        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any, name: str = name) -> None:
            hidden, ids, gates = (*args, *kwargs.values())[:3]
            truth = truths.setdefault(name, Truth(module.num_experts))
            x = hidden.double()
            with torch.no_grad():
                count_slots(truth, ids, gates, lambda t, e: slot_output(module, x[t], e))

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield truths
    finally:
        for handle in handles:
            handle.remove()


def check(layer: Any, expected: dict[str, Tensor], *, rtol: float) -> None:
    """Counts bit-exact, everything else within `rtol` of the largest value of its field."""
    for name, value in expected.items():
        actual = getattr(layer, name)
        if actual is None:
            continue
        if value.dtype == torch.int64:
            assert torch.equal(actual, value), f"{name}: {actual} != {value}"
        else:
            error = (actual.double() - value).abs().max()
            assert error <= rtol * max(float(value.abs().max()), 1e-30), f"{name}: off by {error}"
