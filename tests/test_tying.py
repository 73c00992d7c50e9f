"""A model with merged experts computes what the definition says, and is put back exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import saved
from merges import some_merge
from tiny import tiny_inputs, tiny_model
from torch import Tensor, nn

import reap
from reap.errors import ReapError
from reap.merging.mergeplan import Group, Merge
from reap.merging.tying import merged
from reap.model.experts import find_experts
from reap.model.identity import describe


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**tiny_inputs(model)).logits


def routed(model: nn.Module) -> dict[str, tuple[Tensor, ...]]:
    """Of one forward, by layer: what its experts were given (hidden, ids, gates), and their
    output."""
    found: dict[str, tuple[Tensor, ...]] = {}
    with torch.no_grad():
        hooks = [
            experts.module.register_forward_hook(
                lambda module, args, out, name=experts.name: found.update({name: (*args, out)})
            )
            for experts in find_experts(model)
        ]
        logits(model)
        for hook in hooks:
            hook.remove()
    return found


# Gated, with biases and transposed, and not gated (parts of which compute in fp32).
@pytest.mark.parametrize(
    ("model_type", "close"), [("qwen3_moe", 1e-12), ("gpt_oss", 1e-12), ("nemotron_h", 1e-6)]
)
def test_every_id_of_a_group_runs_its_mean_and_gates_add_up(model_type: str, close: float) -> None:
    """In fp64: E' experts of their own, to which the router's E outputs map with summed gates."""
    model: Any = tiny_model(model_type, dtype=torch.float64)
    model.set_experts_implementation("eager")  # the others have no fp64
    merge = some_merge(describe(model))
    with merged(model, merge):
        seen = routed(model)
    experts = {one.name: one for one in find_experts(model)}
    for name, (hidden, ids, gates, out) in seen.items():
        module, groups = experts[name].module, merge.groups[name]
        place = {i: g for g, group in enumerate(groups) for i in group.experts}
        own = {n: p.data.clone() for n, p in module.named_parameters(recurse=False)}
        summed = torch.zeros(len(ids), len(groups), dtype=torch.float64)
        for t, k in torch.cartesian_prod(torch.arange(len(ids)), torch.arange(ids.shape[1])):
            summed[t, place[int(ids[t, k])]] += gates[t, k]
        truth = torch.zeros_like(out)
        for g, group in enumerate(groups):
            for n, parameter in module.named_parameters(recurse=False):
                total = sum(group.weights)
                mean = sum(w / total * own[n][i] for w, i in zip(
                    group.weights, group.experts, strict=True
                ))  # fmt: skip
                parameter.data[0] = mean
            with torch.no_grad():
                ones = torch.ones(len(ids), 1, dtype=gates.dtype)
                y = module(hidden, torch.zeros(len(ids), 1, dtype=torch.int64), ones)
            truth += summed[:, g : g + 1] * y.reshape(truth.shape)
            for n, parameter in module.named_parameters(recurse=False):
                parameter.data.copy_(own[n])
        torch.testing.assert_close(out, truth, rtol=close, atol=close)


def test_put_back_exactly_also_after_an_exception() -> None:
    model: Any = tiny_model("qwen3_moe", dtype=torch.bfloat16)
    model.set_experts_implementation("eager")  # another wants rows of 16 bytes
    before = {n: (p, p.data_ptr(), p.clone()) for n, p in model.named_parameters()}
    merge = some_merge(describe(model))
    plain = logits(model)
    with pytest.raises(KeyError), merged(model, merge):
        assert not torch.equal(logits(model), plain)
        with merged(model, some_merge(describe(model), groups=1)):
            inner = logits(model)
        assert not torch.equal(logits(model), inner)
        raise KeyError
    for name, parameter in model.named_parameters():
        own, address, value = before[name]
        assert parameter is own and parameter.data_ptr() == address
        assert torch.equal(parameter, value), name
    assert torch.equal(logits(model), plain)


def test_no_group_of_several_changes_nothing() -> None:
    model = tiny_model("qwen3_moe")
    merge = some_merge(describe(model), groups=8)
    plain = logits(model)
    with merged(model, merge):
        assert torch.equal(logits(model), plain)


def test_observed_while_merged(tmp_path: Path) -> None:
    """The statistics are those of the merged experts, under the ids that the router chose."""
    model = tiny_model("qwen3_moe")
    info = describe(model)
    everything = {
        name: (Group(tuple(range(8)), (1,) * 8),) for name in (x.name for x in info.layers)
    }
    one = Merge(info, "random", everything)
    one.save(tmp_path / "merge.json")
    with merged(model, tmp_path / "merge.json"), torch.no_grad(), reap.observe(model) as stats:
        model(**tiny_inputs(model))
    first = stats[stats.layers[0]]
    assert (first.count > 0).sum() > 1 and int(first.count.sum()) == 36


class Expert(nn.Module):
    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, width), nn.Linear(width, 4)


def test_experts_in_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    from reap.merging import tying
    from reap.model.experts import Experts

    listed = nn.ModuleList(Expert() for _ in range(3))
    rows = tying.rows_of(Experts("layers.0.experts", listed, nn.Module(), "list"))
    assert len(rows) == 4 and all(len(each) == 3 for each in rows)
    before = [p.clone() for p in listed.parameters()]
    with tying.tied((quantity, Group((0, 2), (1, 3))) for quantity in rows):
        mean = 0.25 * before[0].double() + 0.75 * before[8].double()
        assert torch.equal(listed[0].up.weight, mean.float())
        assert torch.equal(listed[2].up.weight, mean.float())
        assert torch.equal(listed[1].up.weight, before[4])
    assert all(torch.equal(a, b) for a, b in zip(listed.parameters(), before, strict=True))

    odd = nn.ModuleList([Expert(), Expert(6)])
    with pytest.raises(ReapError, match=r"expert 1 .*\[6, 4\], of expert 0 .*\[5, 4\]: exp"):
        tying.rows_of(Experts("layers.0.experts", odd, nn.Module(), "list"))
    other = nn.ModuleList([Expert(), nn.Linear(4, 4)])
    with pytest.raises(ReapError, match="expert 1 and expert 0 differ in bias"):
        tying.rows_of(Experts("layers.0.experts", other, nn.Module(), "list"))


def test_weights_without_a_mean_are_refused_before_anything_changes(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    merge = some_merge(describe(model))
    last = find_experts(model)[-1].module
    before = {name: p.clone() for name, p in model.named_parameters()}
    last.down_proj = nn.Parameter(last.down_proj.data.to(torch.float8_e4m3fn), requires_grad=False)
    message = "down_proj is of torch.float8_e4m3fn: quantised weights have no mean"
    with pytest.raises(ReapError, match=message), merged(model, merge):
        pass
    rest = {name: p for name, p in model.named_parameters() if p is not last.down_proj}
    assert all(torch.equal(p, before[name]) for name, p in rest.items())
    last.down_proj = nn.Parameter(torch.empty(8, 32, 20, device="meta"))
    with pytest.raises(ReapError, match="down_proj is on the meta device"), merged(model, merge):
        pass
    vars(model)["hf_quantizer"] = object()
    with pytest.raises(ReapError, match="has quantised weights, which have no mean"):
        with merged(model, merge):
            pass


def test_a_merge_of_another_model(tmp_path: Path) -> None:
    saved(tmp_path / "other", "mixtral")
    merge = some_merge(describe(tiny_model("mixtral")))
    with pytest.raises(ReapError, match="made for another model than .*: model type mixtral"):
        with merged(tiny_model("qwen3_moe"), merge):
            pass
    more = some_merge(describe(tiny_model("qwen3_moe", num_experts=6)))
    with pytest.raises(ReapError, match="num_experts 6 against 8"):
        with merged(tiny_model("qwen3_moe"), more):
            pass


def test_experts_that_are_not_all_here() -> None:
    model = tiny_model("qwen3_moe")
    merge = some_merge(describe(model))
    vars(find_experts(model)[1].module)["_is_expert_parallel"] = True
    with pytest.raises(ReapError, match="does not hold all of its 8 experts: load the model"):
        with merged(model, merge):
            pass
