"""The MTP layer behind a model: which tokens it sees, and what it does to the model (nothing)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from brute import check, run
from mtps import EACH_ROW, Checkpoint, computed_by_hand, saved_with_mtp
from tiny import tiny_inputs
from torch import Tensor
from transformers import DynamicCache

from reap.errors import ReapError
from reap.model.load import load_model, load_mtp
from reap.observation.patch import observe
from reap.statistics.stats import Statistics


@pytest.fixture
def made(tmp_path: Path) -> Checkpoint:
    return saved_with_mtp(tmp_path, "glm4_moe")


def observed(folder: Path, **inputs: Any) -> Statistics:
    model = load_model(folder)
    with torch.no_grad(), observe(model, mtp=load_mtp(model)) as stats:
        model(**inputs)
    return stats


@pytest.mark.parametrize("model_type", EACH_ROW)
def test_statistics_are_those_of_the_layer_computed_by_hand(
    model_type: str, tmp_path: Path
) -> None:
    made = saved_with_mtp(tmp_path, model_type)
    ids = tiny_inputs(made.model, batch=1)["input_ids"]
    stats = observed(tmp_path, input_ids=ids)
    _, truth = computed_by_hand(made, ids)
    assert truth.tokens == ids.shape[1] - 1
    check(stats[made.names.experts], truth.fields(), rtol=1e-4)
    others = {name: stats[name].tokens for name in stats.layers if name != made.names.experts}
    assert set(others.values()) == {ids.shape[1]} and stats.tokens == ids.shape[1]


@pytest.mark.parametrize(
    ("model_type", "side"), [("glm4_moe", "left"), ("glm4_moe", "right"), ("qwen3_5_moe", "left")]
)
def test_a_token_counts_when_it_and_the_next_are_no_padding(
    model_type: str, side: str, tmp_path: Path
) -> None:
    """In a composite model the layers are given embeddings in place of ids."""
    made = saved_with_mtp(tmp_path, model_type)
    inputs = tiny_inputs(made.model, lengths=[9, 4, 1], side=side)
    counts, sums = torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.float64)
    for row, mask in zip(*inputs.values(), strict=True):
        alone = row[mask.bool()][None]
        if alone.shape[1] > 1:
            truth = computed_by_hand(made, alone)[1].fields()
            counts += truth["count"]
            sums += truth["weighted_sum"]
    with torch.no_grad(), observe(made.model, mtp=load_mtp(made.model, tmp_path)) as stats:
        made.model(**inputs)
    found = stats[made.names.experts]
    assert found.tokens == 11 and torch.equal(found.count, counts)
    check(found, {"weighted_sum": sums}, rtol=1e-4)


def test_the_model_computes_what_it_does_without(made: Checkpoint) -> None:
    model: Any = load_model(made.folder)
    inputs = tiny_inputs(model)
    with observe(model):
        alone = run(model, inputs)
    before = dict(model.get_decoder()._forward_hooks)
    with torch.no_grad(), observe(model, mtp=load_mtp(model)) as stats:
        assert torch.equal(run(model, inputs), alone)
        whole = stats[made.names.experts].count
        model(**inputs, return_dict=False)
        assert torch.equal(stats[made.names.experts].count, 2 * whole)
        model(input_ids=inputs["input_ids"][:, :1])  # no token has a next one
        assert stats[made.names.experts].tokens == 2 * 16
    assert dict(model.get_decoder()._forward_hooks) == before
    run(model, inputs)
    assert stats[made.names.experts].tokens == 2 * 16


def test_positions_are_those_of_the_call(made: Checkpoint) -> None:
    """Two texts in one row, told apart by positions."""
    ids = tiny_inputs(made.model, batch=1, length=10)["input_ids"]
    positions = torch.cat([torch.arange(6), torch.arange(4)])[None]
    packed = observed(made.folder, input_ids=ids, position_ids=positions, use_cache=False)
    plain = observed(made.folder, input_ids=ids, use_cache=False)
    name = made.names.experts
    assert packed[name].tokens == plain[name].tokens == 9
    assert not torch.equal(packed[name].weighted_sum, plain[name].weighted_sum)


def prepared(inputs: dict[str, Tensor]) -> dict[str, Any]:
    length = inputs["input_ids"].shape[1]
    mask = torch.full((length, length), -1e30).triu(1)[None, None]
    return {"input_ids": inputs["input_ids"], "attention_mask": mask}


def test_calls_that_it_cannot_follow(made: Checkpoint) -> None:
    model: Any = load_model(made.folder)
    inputs = tiny_inputs(model)
    with torch.no_grad(), pytest.raises(ReapError, match="this call continues one: call the model"):
        with observe(model, mtp=load_mtp(model)):
            cache = DynamicCache(config=model.config)
            model(input_ids=inputs["input_ids"], past_key_values=cache)
            model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache)
    with (
        torch.no_grad(),
        pytest.raises(ReapError, match=r"needs an attention_mask \[batch, length"),
    ):
        with observe(model, mtp=load_mtp(model)):
            model(**prepared(inputs))


def test_what_is_no_layer_of_this_model(made: Checkpoint, tmp_path: Path) -> None:
    model: Any = load_model(made.folder)
    wrong: Any = True
    with pytest.raises(ReapError, match=r"mtp is a bool: it must be what reap.load_mtp\(model\)"):
        with observe(model, mtp=wrong):
            pass
    other = saved_with_mtp(tmp_path / "other", "qwen3_next")
    mtp = load_mtp(load_model(other.folder))
    with pytest.raises(ReapError, match="mtp is of another model than this Glm4MoeModel"):
        with observe(model, mtp=mtp):
            pass
    with observe(model):  # nothing of the failed ones is left
        pass


def test_only_some_tokens_count(made: Checkpoint, tmp_path: Path) -> None:
    """Those of the model, and at the layer the same ones but for each row's last."""
    model = load_model(tmp_path)
    inputs = tiny_inputs(model, lengths=[9, 5])
    counted = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    parts = []
    for tokens in (counted, ~counted, None):
        with torch.no_grad(), observe(model, mtp=load_mtp(model)) as stats, stats.counting(tokens):
            model(**inputs)
        parts.append(stats)
    assert parts[0] + parts[1] == parts[2]
    real = inputs["attention_mask"].bool()
    expected = counted[:, :-1] & real[:, :-1] & real[:, 1:]
    assert parts[0][made.names.experts].tokens == int(expected.sum())
