"""MoE layers as they are found among the modules of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_model

from reap.errors import ReapError
from reap.model.experts import find_experts
from reap.model.identity import describe
from reap.model.info import LayerInfo


def test_layers_are_read_off_the_modules() -> None:
    info = describe(tiny_model("qwen3_moe", decoder_sparse_step=2))
    assert info.model_type == "qwen3_moe"
    names = [f"model.layers.{i}.mlp.experts" for i in (1, 3)]
    assert info.layers == tuple(LayerInfo(name, 8, 2) for name in names)


@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        # DeepSeek-V3 scores a group by the sum of its best two, V2 by its best, or has no groups.
        ("deepseek_v3", {"n_group": 4, "topk_group": 2}, (4, 2, 2)),
        (
            "deepseek_v2",
            {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
            (4, 2, 1),
        ),
        ("deepseek_v2", {"n_group": 4, "topk_group": 2, "topk_method": "greedy"}, (1, 1, 1)),
        ("glm4_moe", {"n_group": 2, "topk_group": 1}, (2, 1, 2)),
        ("nemotron_h", {"n_group": 2, "topk_group": 1}, (2, 1, 2)),
        ("kimi_linear", {"num_expert_group": 2, "topk_group": 1}, (2, 1, 2)),
        ("afmoe", {"n_group": 2, "topk_group": 1}, (1, 1, 1)),
        ("mixtral", {}, (1, 1, 1)),
    ],
)
def test_router_groups(model_type: str, fields: dict[str, Any], expected: Any) -> None:
    layer = describe(tiny_model(model_type, **fields)).layers[0]
    assert (layer.n_group, layer.topk_group, layer.min_per_group) == expected


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("gemma4", {"top_k_experts": 3}),
        ("hunyuan_v1_moe", {"moe_topk": [3, 3, 3, 3]}),
        ("ernie4_5_moe", {"moe_k": 3}),
        ("jamba", {"num_experts_per_tok": 3}),
        ("granitemoe", {"num_experts_per_tok": 3}),
    ],
)
def test_top_k(model_type: str, fields: dict[str, Any]) -> None:
    assert {layer.top_k for layer in describe(tiny_model(model_type, **fields)).layers} == {3}


def test_tied_experts_are_one_layer() -> None:
    model = tiny_model("diffusion_gemma")
    assert len(find_experts(model)) == 8 and len(describe(model).layers) == 4


def test_experts_of_other_towers_are_left_alone() -> None:
    names = [layer.name for layer in describe(tiny_model("dots3_note")).layers]
    assert names == [f"model.language_model.layers.{i}.mlp.experts" for i in (1, 2, 3)]


def test_fewer_experts_than_the_config_says() -> None:
    model = tiny_model("qwen3_moe")
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj[:6].clone())
    with pytest.raises(ReapError, match=r"layers\.1.*config says 8 experts, down_proj holds 6"):
        describe(model)
