"""Experts that are not on transformers' experts interface: measured, or an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from brute import Truth, check, run
from tiny import tiny_inputs, tiny_model
from torch import Tensor, nn

from reap.errors import ReapError
from reap.model.experts import find_experts
from reap.observation.patch import observe


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


@torch.no_grad()
def test_llama4_counts_what_its_router_chose() -> None:
    """Gates that are rounded to 0 tell nothing: the logits do, and f(0) / 0 is no norm."""
    model = tiny_model("llama4_text", dtype=torch.float16, num_experts_per_tok=3)
    experts = find_experts(model)[0]
    router = experts.block.router
    router.weight.mul_(40)
    router.forward = lambda x, own=router.forward: biased(own, x)

    def biased(own: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = nn.functional.linear(x, router.weight) - 60  # sigmoid is 0 for most of them
        top, ids = logits.topk(3, dim=1)
        scores = torch.full_like(logits, -torch.inf).scatter_(1, ids, top).float().sigmoid()
        chosen.append(ids)
        return scores.to(x.dtype), logits

    chosen: list[Tensor] = []
    with observe(model) as stats:
        run(model, tiny_inputs(model, length=24))
    layer = stats[experts.name]
    assert layer.count.tolist() == chosen[0].flatten().bincount(minlength=8).tolist()
    assert all(getattr(layer, field).isfinite().all() for field in ("norm_sum", "weighted_sum"))


class RemoteMoE(nn.Module):
    """The shape of code that comes with a checkpoint: a list of experts, walked in a loop."""

    def __init__(self, config: Any, mlp: type[nn.Module], experts: int) -> None:
        super().__init__()
        self.top_k = 2
        self.gate = nn.Linear(config.hidden_size, experts, bias=False)
        self.experts = nn.ModuleList(mlp(config, intermediate_size=16) for _ in range(experts))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gates, ids = self.gate(x).float().softmax(-1).topk(self.top_k)
        return ids, (gates / gates.sum(-1, keepdim=True)).to(x.dtype)

    def combine(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            out.index_add_(0, token, expert(x[token]) * gates[token, slot, None])
        return out

    def forward(self, hidden: Tensor) -> Any:
        x = hidden.flatten(0, 1)
        return self.combine(x, *self.route(x)).view(hidden.shape), None


class Sorted(RemoteMoE):
    """Tokens sorted by expert, a scaled sigmoid router, shared experts, one output.

    How many experts a token gets is in the model's configuration alone.
    """

    def __init__(self, config: Any, mlp: type[nn.Module], experts: int) -> None:
        super().__init__(config, mlp, experts)
        del self.top_k
        self.shared_experts = mlp(config, intermediate_size=16)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gates, ids = self.gate(x).sigmoid().topk(2)
        return ids, 2.5 * gates

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.flatten(0, 1)
        ids, gates = self.route(x)
        order, start, parts = ids.flatten().argsort(), 0, []
        for number, stop in enumerate(ids.flatten().bincount(minlength=8).cumsum(0).tolist()):
            if stop > start:
                parts.append(self.experts[number](x[order[start:stop] // 2]))
            start = stop
        slots = torch.empty_like(torch.cat(parts))
        slots[order] = torch.cat(parts)
        out = (slots.view(*ids.shape, -1) * gates[..., None]).sum(1)
        return (out + 30 * self.shared_experts(x)).view(hidden_states.shape)


class Dense(RemoteMoE):
    """Every expert runs on every token, in two halves; most gates are zero."""

    def combine(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        full = torch.zeros(len(x), len(self.experts), dtype=x.dtype).scatter(1, ids, gates)
        return torch.cat(
            [
                sum(g[:, n, None] * expert(h) for n, expert in enumerate(self.experts))
                for h, g in zip(x.chunk(2), full.chunk(2), strict=True)
            ]
        )


class Layer(nn.Module):
    """Its caller, which takes the first of what it returns."""

    def __init__(self, moe: RemoteMoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        out = self.moe(x)
        return out[0] if isinstance(out, tuple) else out


def remote_model(block: type[RemoteMoE], experts: int = 8, **options: Any) -> nn.Module:
    model = tiny_model("deepseek_v3")
    torch.manual_seed(0)
    for layer in model.model.layers[1:]:
        layer.mlp = Layer(block(model.config, type(model.model.layers[0].mlp), experts))
    return model.to(**options).eval()


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [RemoteMoE, Sorted, Dense])
@torch.no_grad()
def test_a_list_of_experts(block: type[RemoteMoE], dtype: torch.dtype, caplog: Any) -> None:
    """40 experts, more than the model has columns, in the fp32 case of the first."""
    experts = 40 if (block, dtype) == (RemoteMoE, torch.float32) else 8
    model = remote_model(block, experts, dtype=dtype)
    inputs = tiny_inputs(model, lengths=[40, 25])
    expected = run(model, inputs)
    with observe(model) as stats:
        assert torch.equal(run(model, inputs), expected)
    assert stats.tokens == 65 and len(stats.layers) == 3
    assert sum("without its experts" in record.message for record in caplog.records) == 1
    assert not any("forward" in vars(module) for module in model.modules())

    moe = model.model.layers[3].mlp.moe
    seen: list[Tensor] = []
    moe.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    run(model, inputs)
    x = seen[0].flatten(0, 1)[inputs["attention_mask"].flatten().bool()]
    truth = Truth(experts)
    for t, (ids, gates) in enumerate(zip(*moe.route(x), strict=True)):
        for expert, gate in zip(ids.tolist(), gates.tolist(), strict=True):
            y = moe.experts[expert](x[t : t + 1]).double()
            truth.slots.append((t, expert, gate, float(y.norm()), float(y.abs().max())))
    fields = {k: v for k, v in truth.fields().items() if k[:2] != "co"}
    check(stats[stats.layers[2]], fields, rtol=1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("block", [RemoteMoE, Sorted])
@torch.no_grad()
def test_a_list_of_experts_whose_gates_are_rounded_to_zero(block: type[RemoteMoE]) -> None:
    """In fp16 the second gate of most tokens is 0: its expert got the token all the same."""
    model = remote_model(block, dtype=torch.float16)
    moe = model.model.layers[3].mlp.moe
    own = moe.route

    def route(x: Tensor) -> tuple[Tensor, Tensor]:
        ids, gates = own(x)
        gates = torch.where(torch.arange(len(x))[:, None] % 3 > 0, gates, gates.new_tensor([1, 0]))
        return ids, gates

    moe.route = route
    seen: list[Tensor] = []
    moe.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with observe(model, pairs=True) as stats:
        run(model, tiny_inputs(model, lengths=[40, 25]))
    real = tiny_inputs(model, lengths=[40, 25])["attention_mask"].flatten().bool()
    x = seen[0].flatten(0, 1)
    truth = Truth(8)
    for t, (ids, gates) in enumerate(zip(*route(x), strict=True)):
        for expert, gate in zip(ids.tolist(), gates.tolist(), strict=True):
            y = moe.experts[expert](x[t : t + 1]).double()
            truth.slots.append((t, expert, gate, float(y.norm()), float(y.abs().max())))
    layer = stats[stats.layers[2]]
    assert int(layer.count.sum()) == 65 * 2
    check(layer, truth.fields(keep=real), rtol=1e-2)


class Bounded(RemoteMoE):
    def combine(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        return super().combine(x, ids, gates).tanh()


class Normed(RemoteMoE):
    def combine(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        return nn.functional.rms_norm(super().combine(x, ids, gates), x.shape[-1:])


class Fickle(RemoteMoE):
    def combine(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        return super().combine(x, torch.rand(len(x), 8).argsort(1)[:, :2], gates)


class GateInside(RemoteMoE):
    def combine(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        return self.experts[0](x, gates[:, :1])


class Functional(RemoteMoE):
    def combine(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        return self.experts[0].down_proj(self.experts[0].up_proj(x))


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Bounded, "not a weighted sum"),
        (Normed, "not a weighted sum"),
        (Fickle, "routes otherwise when it runs again"),
        (Functional, "does not call its experts"),
    ],
)
def test_a_list_of_experts_that_cannot_be_asked(block: type[RemoteMoE], reason: str) -> None:
    model = remote_model(block)
    with pytest.raises(ReapError, match=rf"ModuleList .*layers\.1.*({reason})"), observe(model):
        run(model, tiny_inputs(model))
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("place", ["elsewhere", "twice"])
def test_a_list_with_fewer_experts_than_entries(place: str) -> None:
    """Expert parallelism leaves None where another process has the expert."""
    model = remote_model(RemoteMoE)
    experts = model.model.layers[2].mlp.moe.experts
    experts._modules["3"] = None if place == "elsewhere" else experts[4]
    with pytest.raises(ReapError, match=r"layers\.2.* not here, or twice"), observe(model):
        raise AssertionError("something ran")
    assert not any("forward" in vars(module) for module in model.modules())


def test_experts_of_a_list_that_apply_the_gate_themselves() -> None:
    model = remote_model(GateInside)
    for expert in (e for layer in model.model.layers[1:] for e in layer.mlp.moe.experts):
        own = expert.forward
        expert.forward = lambda x, gate, own=own: gate * own(x)
    with pytest.raises(ReapError, match="do not map hidden states"), observe(model):
        run(model, tiny_inputs(model))
    assert all("forward" in vars(e) for e in model.model.layers[1].mlp.moe.experts)


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
