"""Slots whose gate is zero: chosen and rounded, or no choice at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from brute import brute_force, check, eager_truth, run
from tiny import tiny_inputs, tiny_model
from torch import nn

from reap.model.experts import find_experts, router_of
from reap.observation.patch import observe


@torch.no_grad()
def sharpened(model_type: str) -> nn.Module:
    """In fp16, with a router so sure that most gates are rounded to zero."""
    model = tiny_model(model_type, dtype=torch.float16)
    model.set_experts_implementation("eager")  # others have no kernel for these sizes
    for experts in find_experts(model):
        router: Any = getattr(experts.block, "gate", None) or experts.block.router
        weight = router.router_mlp.out_proj.weight if model_type == "zaya" else router.weight
        weight.mul_(150)
    return model


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v2", "olmoe"])
def test_slots_with_gates_that_are_rounded_to_zero_count(model_type: str) -> None:
    """deepseek_v2 keeps its gates in fp32, where a softmax reaches zero as well."""
    model = sharpened(model_type)
    inputs = tiny_inputs(model, length=24)
    with observe(model, pairs=True) as stats, brute_force(model) as truth:
        run(model, inputs)
    zero = sum(gate == 0 for name in stats.layers for _, _, gate, _, _ in truth[name].slots)
    assert zero > 5 or model_type == "deepseek_v2"
    for name in stats.layers:
        assert int(stats[name].count.sum()) == 48 * 2
        check(stats[name], truth[name].fields(), rtol=1e-2)


def test_a_skipped_slot_is_told_from_a_gate_of_zero() -> None:
    """ZAYA gives both the id 0 and the gate 0."""
    model = sharpened("zaya")
    for experts in find_experts(model):
        router: Any = router_of(experts.block)
        router.balancing_biases[0], router.balancing_biases[-1] = 1.25, 0.5  # 0, or else skip
        scores = router.router_mlp.out_proj.weight
        scores.data = scores[[0, 1, 8, 3, 5, 6, 7, 2, 4]]  # so that some tokens do
    inputs = tiny_inputs(model, length=24)
    expected, _ = eager_truth(model, inputs)
    with observe(model) as stats, brute_force(model) as truth:
        actual = run(model, inputs)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    skipped = [48 - int(stats[name].count.sum()) for name in stats.layers]
    zero = [gate == 0 for name in stats.layers for _, e, gate, _, _ in truth[name].slots if e == 0]
    assert any(skipped) and any(zero)
    for name in stats.layers:
        check(stats[name], truth[name].fields(), rtol=1e-2)


def test_experts_called_without_their_router_have_no_phantoms() -> None:
    """What the router said of an earlier call is not taken for this one."""
    model = tiny_model("zaya")
    inputs = tiny_inputs(model, length=3, batch=1)
    experts = find_experts(model)[0]
    router: Any = router_of(experts.block)
    router.balancing_biases[-1] = 2.0  # skips all
    with observe(model) as stats, torch.no_grad():
        run(model, inputs)
        ids, gates = torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 1)
        experts.module(torch.randn(3, 32), ids, gates)
    assert stats[experts.name].tokens == 6 and stats[experts.name].count.tolist()[0] == 3
