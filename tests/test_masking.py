"""A masked model computes what the pruned checkpoint computes, and is put back as it was."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from brute import run
from folders import edit_config, saved, some_plan
from mtps import Checkpoint, saved_with_mtp
from tiny import model_types, tiny_inputs, tiny_model

import reap
from reap.checkpoint.pruning import prune
from reap.errors import ReapError
from reap.model.identity import describe
from reap.model.load import load_model, load_mtp
from reap.planning.plan import Plan
from reap.runs.masking import check_plan_of, masked

# What each one adds: softmax and top-k, correction bias and groups, the bias in the block, bias on
# logits, no module of its own, statics [1, E], classes after the experts and a count read off the
# configuration, a table of tokens, off the interface, a gate on the experts' input, tied experts.
REPRESENTATIVE = (
    "qwen3_moe", "deepseek_v3", "minimax_m2", "gpt_oss", "gemma4", "ernie4_5_moe", "zaya",
    "deepseek_v4", "dbrx", "llama4_text", "diffusion_gemma",
)  # fmt: skip
OFF_INTERFACE = ("dbrx", "llama4_text", "step3p7")
REFUSED = {"ernie4_5_vl_moe"}  # cannot be pruned


def logits(model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(0)  # a diffusion model draws its canvas
    return run(model, tiny_inputs(model))


def state_of(model: torch.nn.Module) -> list[tuple[Any, ...]]:
    """All that a mask could leave behind."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    modules = [
        (name, id(module), {k: v for k, v in vars(module).items() if not k.startswith("_")})
        for name, module in model.named_modules()
    ]
    hooks = [
        (len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
    ]
    return [*((name, id(tensor)) for name, tensor in tensors), *modules, *hooks]


def check_masked(tmp_path: Path, model_type: str, keep: int = 5, **overrides: Any) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    kind = type(saved(base, model_type, **overrides))
    model, plan = kind.from_pretrained(base).eval(), some_plan(base, keep)
    prune(base, plan, out, verify=False)
    pruned, whole, before = logits(kind.from_pretrained(out).eval()), logits(model), state_of(model)
    with masked(model, plan):
        ours = logits(model)
    torch.testing.assert_close(ours, pruned, rtol=1e-5, atol=1e-5)
    assert (ours - whole).abs().max() > 0.01
    assert state_of(model) == before and torch.equal(logits(model), whole)


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_computes_what_the_pruned_checkpoint_does(model_type: str, tmp_path: Path) -> None:
    check_masked(tmp_path, model_type)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type", sorted({*model_types(), *OFF_INTERFACE} - {*REPRESENTATIVE} - REFUSED)
)
def test_every_architecture(model_type: str, tmp_path: Path) -> None:
    check_masked(tmp_path, model_type)


SLOW_GROUPS = (pytest.param(name, marks=pytest.mark.slow) for name in ("deepseek_v2", "mistral4"))


@pytest.mark.parametrize("model_type", ["deepseek_v3", *SLOW_GROUPS])
def test_groups(model_type: str, tmp_path: Path) -> None:
    groups: dict[str, Any] = {"n_group": 2, "topk_group": 1}
    if model_type == "deepseek_v2":
        groups["topk_method"] = "group_limited_greedy"
    check_masked(tmp_path, model_type, keep=4, **groups)


def test_in_sixteen_bits_and_on_every_implementation(tmp_path: Path) -> None:
    saved(tmp_path / "base", "deepseek_v3", dtype=torch.bfloat16, moe_intermediate_size=24)
    plan = some_plan(tmp_path / "base")
    prune(tmp_path / "base", plan, tmp_path / "out", verify=False)
    model, pruned = load_model(tmp_path / "base"), load_model(tmp_path / "out")
    for how in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(how)
        pruned.set_experts_implementation(how)
        with masked(model, plan):
            ours = logits(model)
        torch.testing.assert_close(ours, logits(pruned), rtol=2e-2, atol=2e-2)


@pytest.fixture
def model() -> torch.nn.Module:
    return tiny_model("qwen3_moe")


def plan_of(model: torch.nn.Module, keep: int = 5, seed: int = 0) -> Plan:
    return some_plan(Path(), keep, seed=seed, model=describe(model))


def test_many_plans_one_after_another(model: torch.nn.Module) -> None:
    plans = [plan_of(model, keep, seed) for keep in (5, 3, 2) for seed in (0, 1)]

    def masked_logits(plan: Plan) -> torch.Tensor:
        with masked(model, plan):
            return logits(model)

    first = [masked_logits(plan) for plan in plans]
    again = [masked_logits(plan) for plan in reversed(plans)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({tuple(a.flatten()[:9].tolist()) for a in first}) == len(plans)


def test_a_plan_that_drops_nothing_and_a_file(model: torch.nn.Module, tmp_path: Path) -> None:
    whole, plan = logits(model), plan_of(model, 8)
    with masked(model, plan):
        assert torch.equal(logits(model), whole)
    plan_of(model).save(tmp_path / "plan.json")
    with masked(model, tmp_path / "plan.json"):
        assert not torch.equal(logits(model), whole)


def test_is_put_back_after_an_error(model: torch.nn.Module) -> None:
    whole, before = logits(model), state_of(model)
    with pytest.raises(ZeroDivisionError):
        with masked(model, plan_of(model)):
            model(**tiny_inputs(model))
            raise ZeroDivisionError
    assert state_of(model) == before and torch.equal(logits(model), whole)


def test_one_mask_at_a_time_of_a_model(model: torch.nn.Module) -> None:
    other = tiny_model("qwen3_moe", seed=1)
    whole = logits(other)
    with masked(model, plan_of(model)):
        ours = logits(model)
        with pytest.raises(ReapError, match="is masked already: end that mask first"):
            with masked(model, plan_of(model, 3)):
                pass
        assert torch.equal(logits(model), ours), "the refused one left no trace"
        with masked(other, plan_of(other)):
            assert not torch.equal(logits(other), whole)
    assert torch.equal(logits(other), whole)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "llama4_text", "dbrx", "zaya"])
@pytest.mark.parametrize("inside", [True, False], ids=["observed outside", "observed inside"])
def test_observing(model_type: str, inside: bool) -> None:
    """The statistics are of the masked model, and speak of all experts."""
    model = tiny_model(model_type)
    plan = plan_of(model)
    with masked(model, plan):
        truth = logits(model)
    if inside:
        with reap.observe(model) as stats, masked(model, plan):
            ours = logits(model)
    else:
        with masked(model, plan), reap.observe(model) as stats:
            ours = logits(model)
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)
    assert plan.model.difference(stats.model) is None
    for name, dropped in plan.dropped.items():
        layer = stats.layer(name)
        used = layer.count.nonzero().flatten().tolist()
        assert used and set(used) <= set(plan.kept[name]) and dropped
    seen = {name: set(stats.layer(name).count.nonzero().flatten().tolist()) for name in plan.kept}
    again = reap.make_plan(stats, keep=5)
    assert all(seen[name] <= set(kept) for name, kept in again.kept.items())


def test_generation_and_its_thread(tmp_path: Path) -> None:
    saved(tmp_path / "base")
    plan = some_plan(tmp_path / "base", 4)
    prune(tmp_path / "base", plan, tmp_path / "out", verify=False)
    model, pruned = load_model(tmp_path / "base"), load_model(tmp_path / "out")
    inputs = tiny_inputs(model, lengths=[9, 5], side="left")

    def generated(of: Any) -> torch.Tensor:
        return of.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)

    truth, found = generated(pruned), []
    with masked(model, plan):
        assert torch.equal(generated(model), truth)
        thread = threading.Thread(target=lambda: found.append(generated(model)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], truth) and not torch.equal(generated(model), truth)


@pytest.mark.slow
def test_a_compiled_model_runs_uncompiled() -> None:
    model = tiny_model("qwen3_moe", num_hidden_layers=1)
    plan = plan_of(model)
    with masked(model, plan):
        truth = logits(model)
    compiled: Any = torch.compile(model, backend="eager")
    whole = logits(compiled)
    with masked(compiled, plan):
        assert torch.equal(logits(compiled), truth)
    assert torch.equal(logits(compiled), whole)


class _Expert(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = torch.nn.Linear(width, 12, bias=False)
        self.down = torch.nn.Linear(12, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


class _ListBlock(torch.nn.Module):
    """As in code that comes with a checkpoint: a linear gate and a list of experts."""

    def __init__(self, width: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(width, experts, bias=False)
        self.experts = torch.nn.ModuleList(_Expert(width) for _ in range(experts))
        self.num_experts, self.top_k = experts, top_k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)
        gates, ids = self.gate(flat).softmax(-1).topk(self.top_k)
        out = torch.zeros_like(flat)
        for number in range(self.num_experts):
            token, slot = torch.where(ids == number)
            out[token] += gates[token, slot, None] * self.experts[number](flat[token])
        return out.view_as(x)


def listed() -> torch.nn.Module:
    model = tiny_model("qwen3_moe", num_hidden_layers=2)
    torch.manual_seed(0)
    layers: Any = model.get_submodule("model.layers")
    for layer in layers:
        layer.mlp = _ListBlock(32, 8, 2)
    return model.eval()


def test_a_list_of_experts() -> None:
    model = listed()
    plan, before = plan_of(model), state_of(model)
    smaller = listed()
    layers: Any = smaller.get_submodule("model.layers")
    for layer, kept in zip(layers, plan.kept.values(), strict=True):
        block = layer.mlp
        block.gate.weight = torch.nn.Parameter(block.gate.weight.detach()[list(kept)])
        block.experts = torch.nn.ModuleList(block.experts[i] for i in kept)
        block.num_experts = len(kept)
    with masked(model, plan):
        assert torch.equal(logits(model), logits(smaller))
        with pytest.raises(ReapError, match="observe the model first, and mask it inside"):
            with reap.observe(model):
                pass
    assert state_of(model) == before
    with reap.observe(model) as stats, masked(model, plan):
        logits(model)
    for name, kept in plan.kept.items():
        assert set(stats.layer(name).count.nonzero().flatten().tolist()) <= set(kept)


def test_multi_token_prediction(tmp_path: Path) -> None:
    """The plan speaks of that layer: the model alone is masked without it, or with it."""
    checkpoint: Checkpoint = saved_with_mtp(tmp_path, "glm4_moe")
    del checkpoint
    model = load_model(tmp_path)
    mtp = load_mtp(model)
    assert mtp is not None
    plan = some_plan(tmp_path, model=describe(model, mtp=mtp))
    assert len(plan.kept) == len(describe(model).layers) + 1
    hidden, following = torch.randn(2, 1, 5, model.config.hidden_size).unbind()

    def guess() -> torch.Tensor:
        with torch.no_grad():
            return mtp(hidden, following)

    whole = guess()
    with masked(model, plan):
        assert torch.equal(guess(), whole)
    with masked(model, plan, mtp=mtp):
        assert not torch.equal(guess(), whole)
    assert torch.equal(guess(), whole)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_experts_per_tok": 3}, "top_k 2 against 3"),
        ({"num_hidden_layers": 3}, "4 MoE layers against 3"),
        ({"num_experts": 9}, "num_experts 8 against 9"),
    ],
)
def test_plans_of_another_model(
    model: torch.nn.Module, overrides: dict[str, int], message: str
) -> None:
    other = tiny_model("qwen3_moe", **overrides)
    with pytest.raises(ReapError, match=f"made for another model than .*{message}"):
        with masked(other, plan_of(model)):
            pass


def test_other_weights_and_types(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    saved(tmp_path / "b", seed=1)
    plan, other = some_plan(tmp_path / "a"), load_model(tmp_path / "b")
    with pytest.raises(ReapError, match="other weights"):
        with masked(other, plan):
            pass
    with pytest.raises(ReapError, match="other weights"):
        check_plan_of(tmp_path / "b", plan)
    edit_config(tmp_path / "b", num_experts_per_tok=3)
    with pytest.raises(ReapError, match="top_k 2 against 3"):
        check_plan_of(tmp_path / "b", plan)
    with pytest.raises(ReapError, match="model type qwen3_moe against mixtral"):
        with masked(tiny_model("mixtral"), plan):
            pass


def test_fewer_than_a_token_needs(model: torch.nn.Module) -> None:
    plan = plan_of(model)
    with pytest.raises(ReapError, match="cannot keep 1 experts: its router picks 2 per token"):
        replace(plan, kept={name: kept[:1] for name, kept in plan.kept.items()})


def test_routers_that_cannot_be_cut(model: torch.nn.Module) -> None:
    plan = plan_of(model)
    gate: Any = model.get_submodule("model.layers.1.mlp.gate")
    weight = gate.weight

    def refused(message: str) -> None:
        before = state_of(model)
        with pytest.raises(ReapError, match=f"layers.1.mlp.experts.*cannot be masked: .*{message}"):
            with masked(model, plan):
                pass
        assert state_of(model) == before

    gate.weight = torch.nn.Parameter(weight.detach().to("meta"))
    refused("not in memory")
    gate.weight = torch.nn.Parameter((9 * weight.detach()).to(torch.int8), False)
    refused("is int8")
    gate.weight = torch.nn.Parameter(weight.detach()[:7])
    refused(r"float32 \[7, 32\], where axis 0 must have one entry for each of 8 experts")
    gate.weight = weight
    gate.temperatures = torch.nn.Parameter(torch.ones(8))
    refused(r"it is not known what gate.temperatures with shape \[8\] is")


def test_not_a_model() -> None:
    plan = plan_of(tiny_model("qwen3_moe"))
    with pytest.raises(ReapError, match="it must be a transformers model"):
        with masked("model", plan):
            pass
