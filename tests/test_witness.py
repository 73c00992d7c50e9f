"""Layers that are replaced while they are observed, or run more than once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from brute import run
from test_layers import RemoteMoE, remote_model
from tiny import tiny_inputs, tiny_model
from torch import Tensor, nn

from reap.errors import ReapError
from reap.model.experts import find_experts
from reap.observation.patch import observe


class Linearised(nn.Module):
    """What takes the place of fused experts to be quantised: it computes the same by itself."""

    def __init__(self, experts: nn.Module, keep: bool = False) -> None:
        super().__init__()
        self.own = copy.deepcopy(experts)
        if keep:
            self.original = experts

    def forward(self, hidden: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        return type(self.own).forward.__wrapped__(self.own, hidden, ids, gates)


def swap_experts(model: nn.Module, layer: int) -> None:
    block = model.model.layers[layer].mlp
    block.experts = Linearised(block.experts)


def keep_the_old(model: nn.Module, layer: int) -> None:
    block = model.model.layers[layer].mlp
    block.experts = Linearised(block.experts, keep=True)


def swap_block(model: nn.Module, layer: int) -> None:
    block = copy.deepcopy(model.model.layers[layer].mlp)
    block.experts = Linearised(block.experts)
    model.model.layers[layer].mlp = block


def patch_forward(model: nn.Module, layer: int) -> None:
    experts = model.model.layers[layer].mlp.experts
    experts.forward = Linearised(experts).forward


def patch_class(model: nn.Module, layer: int) -> None:
    experts = model.model.layers[layer].mlp.experts
    own = type(experts).forward.__wrapped__
    experts.__class__ = type("Quantised", (type(experts),), {"forward": own})


def patch_block(model: nn.Module, layer: int) -> None:
    model.model.layers[layer].mlp.forward = lambda hidden: hidden


WAYS = [swap_experts, keep_the_old, swap_block, patch_forward, patch_class, patch_block]


@pytest.mark.parametrize("after", [0, 1], ids=["before", "between"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_layer_that_is_replaced_is_an_error(way: Callable[..., None], after: int) -> None:
    """Of all its calls or of the later ones, while the other layers count on."""
    model = tiny_model("qwen3_moe")
    inputs = tiny_inputs(model)
    with pytest.raises(ReapError, match=r"\(model\.layers\.2\.mlp\.experts\) .* while"):
        with observe(model):
            for _ in range(after):
                run(model, inputs)
            way(model, 2)
            run(model, inputs)


def test_a_list_that_loses_experts_is_an_error() -> None:
    for change in (
        lambda experts: experts.__setitem__(3, nn.Identity()),
        lambda experts: setattr(experts[3], "forward", lambda x: x),
    ):
        model = remote_model(RemoteMoE)
        experts = model.model.layers[2].mlp.moe.experts
        with pytest.raises(ReapError, match=r"layers\.2\.mlp\.moe.* lost some of its experts"):
            with observe(model):
                run(model, tiny_inputs(model))
                change(experts)
    assert experts[3].forward(7) == 7  # another program's: left to it


def test_a_list_that_is_copied_is_an_error() -> None:
    """Its copies would run the experts of the first."""
    model = remote_model(RemoteMoE)
    with pytest.raises(ReapError, match=r"layers\.1.* copied while"), observe(model):
        copy.deepcopy(model)


def test_another_implementation_is_an_error() -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(ReapError, match=r"layers\.0.*ran 1 times, 0 of them observed"):
        with observe(model):
            model.set_experts_implementation("eager")
            run(model, tiny_inputs(model))


def test_a_model_that_ran_without_its_layers_is_an_error() -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(ReapError, match="ran and none of its 4 MoE layers did"), observe(model):
        for layer in model.model.layers:
            layer.forward = lambda hidden, **_: hidden
        run(model, tiny_inputs(model))


@torch.no_grad()
def test_layers_that_are_replaced_for_a_while_are_an_error() -> None:
    """A pipeline that calls parts of the model and puts its layers back before the end."""
    model = tiny_model("qwen3_moe")
    with pytest.raises(ReapError, match="ran and none of its 4 MoE layers did"), observe(model):
        blocks = [layer.mlp for layer in model.model.layers]
        for layer in model.model.layers:
            layer.mlp = nn.Identity()
        sequential(model, [tiny_inputs(model)["input_ids"]], 2)
        for layer, block in zip(model.model.layers, blocks, strict=True):
            layer.mlp = block


def test_an_error_under_way_is_not_masked() -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(KeyError, match="mine"), observe(model):
        swap_experts(model, 2)
        run(model, tiny_inputs(model))
        raise KeyError("mine")


def test_a_layer_that_is_never_called_is_named(caplog: Any) -> None:
    model = tiny_model("qwen3_moe")
    with observe(model):
        model.model.layers[2].forward = lambda hidden, **_: hidden
        run(model, tiny_inputs(model))
    assert "MoE layers never called: 1, such as model.layers.2" in caplog.text
    with observe(model):
        pass
    assert "MoE layers never called: 4" in caplog.text


@pytest.mark.parametrize("model_type", ["qwen3_moe", "dbrx", "llama4_text"])
def test_wrapped_layers_that_still_run_are_no_error(model_type: str, caplog: Any) -> None:
    """As offloading and profilers wrap: what is observed is still called."""
    model = tiny_model(model_type)
    inputs = tiny_inputs(model)
    with observe(model) as plain:
        run(model, inputs)
    with observe(model) as stats:
        for experts in find_experts(model):
            for module in (experts.module, experts.block):
                own = module.forward
                module.forward = lambda *args, own=own, **kwargs: own(*args, **kwargs)
        run(model, inputs)
    assert stats == plain and not [r for r in caplog.records if "layers" in r.message]


def sequential(model: nn.Module, batches: list[Tensor], runs: int) -> None:
    """Layer by layer: all batches, `runs` times, and the outputs go on."""
    states = [model.model.embed_tokens(ids) for ids in batches]
    positions = torch.arange(batches[0].shape[1])[None]
    for layer in model.model.layers:
        for _ in range(runs):
            outputs = []
            for state in states:
                angles = model.model.rotary_emb(state, positions)
                outputs.append(layer(state, position_embeddings=angles, position_ids=positions))
        states = outputs


@pytest.mark.parametrize("entry", [False, True])
@torch.no_grad()
def test_a_pipeline_that_runs_layers_twice_is_told(entry: bool, caplog: Any) -> None:
    model = tiny_model("qwen3_moe")
    batches = [tiny_inputs(model, seed=seed)["input_ids"] for seed in range(3)]
    with observe(model) as stats:
        if entry:  # the first calls of the layers come from the model itself
            for ids in batches:
                run(model, {"input_ids": ids})
        sequential(model, batches, 1 if entry else 2)
    assert stats.tokens == 2 * 3 * 18
    assert "4 MoE layers ran more than once on the same input" in caplog.text
    assert "model.layers.0.mlp.experts 2 times" in caplog.text


@torch.no_grad()
def test_runs_that_count_once_say_nothing(caplog: Any) -> None:
    """Layer by layer without repeats, and the same text given twice to the whole model."""
    model = tiny_model("qwen3_moe")
    batches = [tiny_inputs(model, seed=seed)["input_ids"] for seed in range(3)]
    with observe(model) as stats:
        sequential(model, batches, 1)
    assert stats.tokens == 3 * 18
    with observe(model):
        for ids in batches * 2:
            run(model, {"input_ids": ids})
    assert not [r for r in caplog.records if "layers" in r.message]


@torch.no_grad()
def test_layers_called_from_outside_in_different_numbers_are_told(caplog: Any) -> None:
    """As in a pipeline that ends before its last layer, with other tokens each time."""
    model = tiny_model("qwen3_moe")
    experts = [found.module for found in find_experts(model)]
    ids, gates = torch.zeros(5, 2, dtype=torch.int64), torch.rand(5, 2)
    with observe(model):
        for module in (*experts, experts[2]):
            module(torch.randn(5, 32), ids, gates)
            gates = torch.rand(5, 2)
    assert "(model.layers.2.mlp.experts 10, model.layers.0.mlp.experts 5)" in caplog.text


@torch.no_grad()
def test_a_layer_that_runs_more_often_than_the_others_is_told(caplog: Any) -> None:
    model = tiny_model("qwen3_moe")
    inputs = tiny_inputs(model)
    with observe(model):
        run(model, inputs)
        own = model.model.layers[1].mlp.forward
        model.model.layers[1].mlp.forward = lambda hidden: (own(hidden), own(hidden))[0]
        run(model, inputs)
    assert "different numbers of tokens (model.layers.1.mlp.experts 54, model.layers.0" in (
        caplog.text
    )
