"""What is measured on a model is what its experts compute, on the tokens that count."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tiny import model_types, tiny_inputs, tiny_model
from torch import Tensor, nn

from reap.errors import ReapError
from reap.merging.decomposition import LayerErrors, decompose
from reap.merging.pairerrors import summary_of
from reap.model.experts import find_experts


def watched(model: Any, inputs: dict[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
    """hidden, ids, gates of every layer, of one forward."""
    found: dict[str, tuple[Tensor, ...]] = {}
    hooks = [
        one.module.register_forward_hook(
            lambda module, args, out, name=one.name: found.update({name: args})
        )
        for one in find_experts(model)
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return found


def expert(module: nn.Module, i: int, x: Tensor) -> Tensor:
    """Of a gated, concatenated module without biases, in fp64."""
    up, down = (p.data[i].double() for p in (module.gate_up_proj, module.down_proj))
    gate, value = (x.double() @ up.T).chunk(2, -1)
    return (nn.functional.silu(gate) * value) @ down.T


@pytest.mark.parametrize("batches", [1, 3])
def test_against_the_definitions(batches: int) -> None:
    """Also with tokens of several calls, and padding among them."""
    model: Any = tiny_model("qwen3_moe")
    inputs = tiny_inputs(model, lengths=[20, 13, 20, 9, 20, 20])
    seen = watched(model, inputs)
    real = inputs["attention_mask"].bool().flatten()
    parts = [
        {name: x[i::1][: 6 // batches] for name, x in inputs.items()}
        if batches == 1
        else {name: x[2 * i : 2 * i + 2] for name, x in inputs.items()}
        for i in range(batches)
    ]
    found = decompose(model, parts, tokens=90, least=3, pairs=7)
    assert list(found) == list(seen)
    modules = {one.name: one.module for one in find_experts(model)}
    for name, layer in found.items():
        hidden, ids, gates = (x[real][:90] for x in seen[name])
        assert layer.tokens == 90 and len(layer.pairs) == 7
        module = modules[name]
        for pair in layer.pairs:
            i, j = pair.experts
            g = torch.stack([torch.where(ids == e, gates, 0).sum(1).double() for e in (i, j)], 1)
            fi, fj = expert(module, i, hidden), expert(module, j, hidden)
            apart = (fi - fj).square().sum(1)
            total = g.sum(1)
            r = g[:, 0] / total
            for costs, rows in ((pair.both, (g > 0).all(1)), (pair.either, total > 0)):
                assert costs.tokens == int(rows.sum())
                alpha = r[rows].mean()
                merge = (total**2 * (r - alpha) ** 2 * apart)[rows].mean()
                prune = (g**2 * apart[:, None])[rows].mean(0)
                bound = (g * (fi.norm(dim=1) + fj.norm(dim=1))[:, None])[rows].square().mean(0)
                torch.testing.assert_close(costs.merge, float(merge), rtol=1e-4, atol=0)
                torch.testing.assert_close(costs.prune, tuple(prune.tolist()), rtol=1e-4, atol=0)
                torch.testing.assert_close(
                    costs.prune_bound, tuple(bound.tolist()), rtol=1e-4, atol=0
                )
            # Two experts per token: the other one is all that is left.
            torch.testing.assert_close(pair.prune_shared, pair.both.prune, rtol=1e-9, atol=0)
            count = (g > 0).sum(0).double()
            kept = {n: p.data.clone() for n, p in module.named_parameters()}
            for n, p in module.named_parameters():
                p.data[i] = ((count[0] * kept[n][i].double() + count[1] * kept[n][j].double())
                             / count.sum()).float()  # fmt: skip
            mean = expert(module, i, hidden)
            for n, p in module.named_parameters():
                p.data.copy_(kept[n])
            rows = total > 0
            gone = g[:, :1] * (fi - mean) + g[:, 1:] * (fj - mean)
            change = float(gone.square().sum(1)[rows].mean())
            torch.testing.assert_close(pair.merge_weights, change, rtol=1e-4, atol=0)


def test_the_model_is_left_as_it_was() -> None:
    model: Any = tiny_model("qwen3_moe").train()
    inputs = tiny_inputs(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    first, second = (decompose(model, [inputs], least=1) for _ in range(2))
    assert first == second and model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(one.module._forward_hooks for one in find_experts(model))


def test_ends_when_all_layers_have_their_tokens() -> None:
    model: Any = tiny_model("qwen3_moe")
    heard: list[int] = []
    found = decompose(
        model, (tiny_inputs(model) for _ in range(9)), tokens=20, least=1, progress=heard.append
    )
    assert heard == [18, 18] and {layer.tokens for layer in found.values()} == {20}


def test_only_the_tokens_that_a_batch_counts() -> None:
    model: Any = tiny_model("qwen3_moe")
    inputs = tiny_inputs(model)
    counted = torch.zeros_like(inputs["input_ids"])
    counted[0, 2:5] = 1
    found = decompose(model, [{**inputs, "counted": counted}], least=1)
    assert {layer.tokens for layer in found.values()} == {3}
    with pytest.raises(ReapError, match="no tokens that count"):
        decompose(model, [{**inputs, "counted": torch.zeros_like(counted)}])


def test_the_summary() -> None:
    model: Any = tiny_model("qwen3_moe", num_experts_per_tok=3)
    layer = next(iter(decompose(model, [tiny_inputs(model, batch=9)], least=2).values()))
    told = json.loads(json.dumps(layer.to_json()))
    assert told["pairs"] == len(told["by_pair"]) == len(layer.pairs) > 10
    either, both = told["either"], told["both"]
    pairs = layer.pairs
    assert either["merge"] == pytest.approx(sum(p.either.merge for p in pairs) / len(pairs))
    wins = sum(p.both.merge < min(p.prune_shared) for p in pairs) / len(pairs)
    assert both["merge_wins_shared"] == pytest.approx(wins)
    weights = [(p.merge_weights or 0) < min(p.either.prune) for p in pairs]
    assert either["merge_weights_wins"] == pytest.approx(sum(weights) / len(pairs))
    assert 0 < either["prune_ratio"] <= 1 and 0.5 < either["merge_order"] <= 1
    nothing = summary_of(())
    assert nothing["pairs"] == 0 and set(nothing["both"].values()) == {None}
    assert LayerErrors("a", 3, ()).to_json()["by_pair"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens is 0: it must be a whole number"),
        ({"pairs": 1.5}, "pairs is 1.5: it must be a whole number"),
        ({"least": True}, "least is True: it must be a whole number"),
    ],
)
def test_numbers_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ReapError, match=message):
        decompose(tiny_model("qwen3_moe"), [], **options)


def test_what_cannot_be_measured() -> None:
    one = tiny_model("qwen3_moe", num_experts_per_tok=1)
    with pytest.raises(ReapError, match="chooses one expert per token, so that no two"):
        decompose(one, [tiny_inputs(one)])
    model: Any = tiny_model("qwen3_moe")
    with pytest.raises(ReapError, match="no tokens that count"):
        decompose(model, [])
    compiled: Any = tiny_model("qwen3_moe")
    compiled.compile()
    with pytest.raises(ReapError, match="the model is compiled"):
        decompose(compiled, [])
    split = tiny_model("qwen3_moe")
    vars(find_experts(split)[1].module)["_is_expert_parallel"] = True
    with pytest.raises(ReapError, match="is split over processes: load the model without"):
        decompose(split, [tiny_inputs(split)])
    find_experts(model)[1].module.down_proj.data[:] = torch.inf
    with pytest.raises(ReapError, match="output is NaN or infinite: check the model's weights"):
        decompose(model, [tiny_inputs(model)])


def test_llama4_experts_cannot_be_called_alone() -> None:
    model = tiny_model("llama4_text", num_experts_per_tok=2)
    with pytest.raises(ReapError, match="cannot be called for one token and expert alone"):
        decompose(model, [tiny_inputs(model)])


def test_weights_without_a_mean_leave_that_one_number_out() -> None:
    model: Any = tiny_model("qwen3_moe")
    layer = find_experts(model)[0]
    layer.module.odd = nn.Parameter(torch.zeros(3))
    found = decompose(model, [tiny_inputs(model)], least=1)
    assert {pair.merge_weights for pair in found[layer.name].pairs} == {None}
    assert found[layer.name].to_json()["either"]["merge_weights"] is None


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(set(model_types()) - {"zaya"}))
def test_every_architecture(model_type: str) -> None:
    model: Any = tiny_model(model_type)
    found = decompose(model, [tiny_inputs(model, batch=8, length=20)], least=2)
    for layer in found.values():
        assert layer.tokens and layer.pairs
        for pair in layer.pairs:
            for costs in (pair.both, pair.either):
                pruned = zip(costs.prune, costs.prune_bound, strict=True)
                assert all(x <= y * (1 + 1e-9) for x, y in pruned)
