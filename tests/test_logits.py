"""Logits of routers: what each architecture's router computed, or said to be unknown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from brute import run
from test_patch import MAIN, PADDABLE
from tiny import tiny_inputs, tiny_model
from torch import Tensor, nn

from reap.errors import ReapError
from reap.model.experts import find_experts
from reap.observation.logits import _why_not
from reap.observation.patch import observe

# Another place, a child, one more column, another number of rows in the weight, a multiplier, a
# router with one more layer, and two that are not on the interface.
ODD = ("llama4_text", "gemma4", "zaya", "inkling_text", "muse_spark", "afmoe", "dbrx")


@contextmanager
def last_linear(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """The last product with a matrix in each router, which is what is scored, by layer and call."""
    found: dict[str, list[Tensor]] = {}
    inside: list[str] = []
    last: list[Tensor] = []
    handles = []
    plain = nn.functional.linear

    def linear(*args: Any) -> Tensor:
        out = plain(*args)
        if inside:
            last[:] = [out]
        return out

    for experts in find_experts(model):
        block = experts.block
        router = getattr(block, "gate", None) or block.router
        name = experts.name

        def before(*_: Any, name: str = name) -> None:
            inside.append(name)

        def after(*_: Any, name: str = name) -> None:
            inside.pop()
            found.setdefault(name, []).append(last.pop().detach().flatten(0, -2).double())

        handles += [router.register_forward_pre_hook(before), router.register_forward_hook(after)]
    nn.functional.linear = linear
    try:
        yield found
    finally:
        nn.functional.linear = plain
        for handle in handles:
            handle.remove()


def cosines(gram: Tensor) -> Tensor:
    size = gram.diagonal().sqrt()
    return gram / size / size[:, None]


def assert_logits(model_type: str) -> None:
    model = tiny_model(model_type)
    inputs = tiny_inputs(model, lengths=[6, 3])
    keep = inputs["attention_mask"].flatten().bool()
    with observe(model, logits=True) as stats, last_linear(model) as truth:
        run(model, inputs)
    assert set(truth) == set(stats.layers)
    for name in stats.layers:
        E = stats[name].num_experts
        (logits,) = truth[name]
        logits = logits[keep, :E]
        scale = float(stats[name].logit_sum.abs().max() / logits.sum(0).abs().max())
        assert scale == pytest.approx(1, rel=1e-3) or model_type == "muse_spark"
        products = stats[name].logit_products
        torch.testing.assert_close(cosines(products), cosines(logits.T @ logits), rtol=0, atol=1e-3)
        torch.testing.assert_close(
            stats[name].logit_sum, scale * logits.sum(0), rtol=0, atol=1e-3 * keep.sum() * scale
        )


@pytest.mark.parametrize("model_type", [*MAIN[:4], *ODD])
def test_logits(model_type: str) -> None:
    assert_logits(model_type)


@pytest.mark.sweep
@pytest.mark.parametrize("model_type", [t for t in PADDABLE if t not in (*MAIN[:4], *ODD)])
def test_logits_of_every_architecture(model_type: str) -> None:
    assert_logits(model_type)


def test_a_router_that_hides_them(caplog: Any) -> None:
    """Probabilities, or nothing: the layers' logits are None, and the log says so once."""
    model = tiny_model("qwen3_moe")
    for layer in model.model.layers:
        own = layer.mlp.gate.forward
        layer.mlp.gate.forward = lambda x, own=own: (own(x)[0].softmax(-1), *own(x)[1:])
    with observe(model, logits=True) as stats:
        run(model, tiny_inputs(model))
    assert all(stats[name].logit_products is None for name in stats.layers)
    assert stats.tokens == 18
    (said,) = [r.message for r in caplog.records if "logits" in r.message]
    assert said == (
        "logits of the router of Qwen3MoeSparseMoeBlock are not recorded: what it returns lies "
        "between 0 and 1, as probabilities do"
    )


def test_a_router_that_is_not_called(caplog: Any) -> None:
    model = tiny_model("qwen3_moe")
    mlp = model.model.layers[1].mlp
    own = mlp.gate.forward
    with observe(model, logits=True) as stats:
        mlp.gate.forward = own
        hooks, mlp.gate._forward_hooks = mlp.gate._forward_hooks, type(mlp.gate._forward_hooks)()
        run(model, tiny_inputs(model))
        mlp.gate._forward_hooks = hooks
    known = [stats[name].logit_products is not None for name in stats.layers]
    assert known == [True, False, True, True]
    assert "did not return them for the tokens that its experts got" in caplog.text


def test_nan_names_layer_and_expert() -> None:
    model = tiny_model("qwen3_moe")
    with torch.no_grad():
        model.model.layers[2].mlp.gate.weight[3] *= 1e9
    with (
        pytest.raises(ReapError, match=r"layers\.2\.mlp\.experts, expert 3: a logit"),
        observe(model, logits=True),
    ):
        run(model, tiny_inputs(model))


@pytest.mark.parametrize(
    ("logits", "known"),
    [
        (torch.rand(2, 8), True),  # too few to tell
        (torch.rand(20, 8), False),
        (torch.randn(2, 8).softmax(-1), False),
        (torch.randn(2, 8).softmax(-1).bfloat16(), False),
        (torch.randn(20, 8).sigmoid(), False),
        (torch.randn(1, 8).softmax(-1), False),
        (torch.zeros(20, 8), True),
        (torch.zeros(0, 8), True),
        (torch.full((1, 8), torch.nan), True),  # which the statistics name
    ],
)
def test_probabilities_are_told_from_logits(logits: Tensor, known: bool) -> None:
    assert (_why_not(logits) is None) == known
