"""Experts that are not on transformers' experts interface: measured, or an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from brute import run
from tiny import tiny_inputs, tiny_model
from torch import Tensor, nn

from reap.errors import ReapError
from reap.models import find_experts
from reap.observe import observe


def test_llama4_counts_contributions() -> None:
    """Its gate multiplies the experts' input: gate times norm is the norm of f(g x)."""
    model = tiny_model("llama4_text")
    inputs = tiny_inputs(model)
    name = find_experts(model)[0].name
    experts = model.get_submodule(name)
    seen: list[tuple[Tensor, Tensor]] = []
    handle = experts.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    expected = run(model, inputs)
    handle.remove()
    with observe(model) as stats:
        assert torch.equal(run(model, inputs), expected)
    scaled, out = (x.view(8, 18, 32) for x in seen[0])
    chosen = scaled.abs().sum(2) > 0
    assert torch.equal(stats[name].count, chosen.sum(1))
    contribution = out.double().norm(dim=2) * chosen
    torch.testing.assert_close(stats[name].weighted_sum, contribution.sum(1), rtol=1e-5, atol=0)


class RemoteGate(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.top_k, self.weight = 2, nn.Parameter(torch.randn(4, config.hidden_size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gates, ids = (x.flatten(0, 1) @ self.weight.T).sigmoid().topk(self.top_k)
        return ids, gates


class RemoteMoE(nn.Module):
    """The shape of code that comes with a checkpoint: a list of experts, walked in a loop."""

    scale = 1.0

    def __init__(self, config: Any, mlp: type[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(mlp(config, intermediate_size=16) for _ in range(4))
        self.gate, self.shared_experts = RemoteGate(config), mlp(config, intermediate_size=16)

    def forward(self, x: Tensor) -> Tensor:
        ids, gates = self.gate(x)
        flat = x.flatten(0, 1)
        out = torch.zeros_like(flat)
        for t in range(len(flat)):
            for expert, gate in zip(ids[t].tolist(), gates[t], strict=True):
                out[t] += self.scale * gate * self.experts[expert](flat[t : t + 1])[0]
        return (out + self.shared_experts(flat)).view(x.shape)


def remote_model() -> nn.Module:
    model = tiny_model("deepseek_v3")
    for layer in model.model.layers[1:]:
        layer.mlp = RemoteMoE(model.config, type(model.model.layers[0].mlp))
    return model


def test_a_list_of_experts() -> None:
    model = remote_model().eval()
    inputs = tiny_inputs(model, lengths=[9, 5])
    with torch.no_grad():
        expected = run(model, inputs)
        with observe(model) as stats:
            assert torch.equal(run(model, inputs), expected)
        block = model.model.layers[3].mlp
        seen: list[Tensor] = []
        block.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        run(model, inputs)
        ids, gates = block.gate(seen[0])
        truth = torch.zeros(4, dtype=torch.float64)
        for t in inputs["attention_mask"].flatten().nonzero().flatten():
            for expert, gate in zip(ids[t], gates[t], strict=True):
                truth[expert] += gate * block.experts[expert](seen[0].flatten(0, 1)[t]).norm()
    assert stats.tokens == 14 and len(stats.layers) == 3
    torch.testing.assert_close(stats[stats.layers[2]].weighted_sum, truth, rtol=1e-5, atol=0)


def test_a_list_of_experts_that_does_not_add_up_is_an_error() -> None:
    model = remote_model().eval()
    model.model.layers[3].mlp.scale = 2.5
    with pytest.raises(ReapError, match=r"ModuleList .*layers\.3.*do not add up"), observe(model):
        run(model, tiny_inputs(model))


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("jetmoe", "JetMoeMoE .* cannot be observed"),
        ("doge", "DogeCDMoE .* cannot be observed"),
        ("llama", "llama model without mixture-of-experts layers"),
    ],
)
def test_a_model_that_cannot_be_observed_is_an_error(model_type: str, message: str) -> None:
    model = tiny_model(model_type)
    with pytest.raises(ReapError, match=message), observe(model):
        raise AssertionError("something ran")
