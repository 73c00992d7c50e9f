"""Logits of routers: what each architecture's router computed, or said to be unknown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from brute import run
from mtps import saved_with_mtp
from test_patch import MAIN, PADDABLE
from tiny import tiny_inputs, tiny_model
from torch import Tensor, nn

from reap.errors import ReapError
from reap.model.experts import find_experts
from reap.model.load import load_model, load_mtp
from reap.observation.logits import _why_not
from reap.observation.patch import observe
from reap.statistics.layerstats import LayerStatistics
from reap.statistics.trace import Trace, read_about

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
        total, products = stats[name].logit_sum, stats[name].logit_products
        assert total is not None and products is not None
        scale = float(total.abs().max() / logits.sum(0).abs().max())
        assert scale == pytest.approx(1, rel=1e-3) or model_type == "muse_spark"
        torch.testing.assert_close(cosines(products), cosines(logits.T @ logits), rtol=0, atol=1e-3)
        torch.testing.assert_close(
            total, scale * logits.sum(0), rtol=0, atol=1e-3 * float(keep.sum()) * scale
        )


@pytest.mark.parametrize("model_type", [*MAIN[:4], *ODD])
def test_logits(model_type: str) -> None:
    assert_logits(model_type)


@pytest.mark.slow
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


def test_of_a_layer_for_multi_token_prediction(tmp_path: Any) -> None:
    """Its router, and its coalitions and trace, are of its own tokens."""
    made = saved_with_mtp(tmp_path, "glm4_moe")
    model = load_model(tmp_path)
    inputs = tiny_inputs(model, lengths=[6, 3])
    trace = Trace(tmp_path / "trace", 50)
    asked: Any = {"logits": True, "coalitions": 50, "trace": trace}
    with observe(model, mtp=load_mtp(model), **asked) as stats, torch.no_grad():
        model(**inputs)
    for name in stats.layers:
        layer, tokens = stats[name], 7 if name == made.names.experts else 9
        assert layer.chosen is not None and layer.chosen.tokens == layer.tokens == tokens
        assert layer.logit_sum is not None and layer.logit_sum.any()
    assert made.names.experts in stats.layers
    assert read_about(tmp_path / "trace")[2] == 9


@pytest.mark.gpu
def test_on_a_gpu_the_sums_are_the_same(tmp_path: Any) -> None:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 10, (3000, 3), generator=g)
    logits = torch.randn(3000, 8, generator=g) * 30
    weights, mask = torch.rand(3000, 3, generator=g), torch.rand(3000, generator=g) < 0.8
    both = []
    for device in ("cpu", "cuda"):
        layer = LayerStatistics(8, coalitions=20, logits=True, device=device)
        given = (x.to(device) for x in (ids, weights, weights, weights, mask))
        layer.update(*given, logits=logits.to(device))
        both.append(layer)
    assert both[0] == both[1]
