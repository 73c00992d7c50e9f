"""What a model is: found from modules, found from a folder, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import model_types, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from reap.errors import ReapError
from reap.info import LayerInfo
from reap.models import (
    describe,
    describe_folder,
    find_experts,
    fingerprint,
    num_experts_key,
    text_config,
)


@pytest.mark.parametrize("model_type", model_types())
def test_a_folder_is_described_as_its_model(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    info = describe(model)
    assert info.weights is None and info.layers
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    assert describe_folder(tmp_path, like=info).difference(info) is None


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


def test_the_fingerprint_is_of_the_structure(tmp_path: Path) -> None:
    """Not of dtype, attention, experts implementation, labels or the tokenizer's ids."""
    model = tiny_model("qwen3_moe")
    before = fingerprint(model.config)
    model.save_pretrained(tmp_path)
    for options in (
        {"dtype": "bfloat16"},
        {"attn_implementation": "eager"},
        {"experts_implementation": "eager"},
    ):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        loaded.config.pad_token_id, loaded.config.use_cache = 3, False
        assert fingerprint(loaded.config) == before
    for field, value in {
        "num_experts": 7,
        "hidden_size": 64,
        "norm_topk_prob": True,
        "hidden_act": "gelu",
    }.items():
        assert fingerprint(tiny_config("qwen3_moe", **{field: value})) != before


def test_weights_tell_two_checkpoints_apart(tmp_path: Path) -> None:
    folders = []
    for seed in (0, 1):
        folders.append(tmp_path / str(seed))
        tiny_model("qwen3_moe", seed=seed).save_pretrained(folders[-1], max_shard_size="100KB")
    one, other = (describe(AutoModelForCausalLM.from_pretrained(folder)) for folder in folders)
    assert one == describe_folder(folders[0]) and one.name == "0"
    assert one.weights is not None and one.fingerprint == other.fingerprint
    assert "weights" in (one.difference(other) or "")
    shard = sorted(folders[0].glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data + b"\0")
    assert describe_folder(folders[0]).weights != one.weights


def test_a_composite_model_whole_or_as_its_language_model(tmp_path: Path) -> None:
    tiny_model("qwen3_5_moe").save_pretrained(tmp_path)
    whole = describe(AutoModelForImageTextToText.from_pretrained(tmp_path))
    part = describe(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert whole.layers[0].name != part.layers[0].name
    assert whole.fingerprint == part.fingerprint and whole.weights == part.weights
    for info in (whole, part):
        assert describe_folder(tmp_path, like=info).difference(info) is None
    assert describe_folder(tmp_path).difference(part) is None


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({"num_experts": 8}, ("num_experts",)),
        ({"num_local_experts": 8, "hidden_size": 8}, ("num_local_experts",)),
        ({"text_config": {"moe_num_experts": 8}}, ("text_config", "moe_num_experts")),
        ({"text_config": None, "n_routed_experts": 4}, ("n_routed_experts",)),
        ({"hidden_size": 8}, None),
    ],
)
def test_the_key_that_counts_experts(config: dict[str, Any], path: Any) -> None:
    assert num_experts_key(config) == path


def test_text_config() -> None:
    config = tiny_config("qwen3_vl_moe")
    assert text_config(config) is config.text_config
    assert text_config(tiny_config("mixtral")).model_type == "mixtral"


def write(folder: Path, config: dict[str, Any] | str) -> Path:
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "llama model without mixture-of-experts layers"),
        ({"model_type": "no_such_model"}, "not usable"),
        ({}, "not usable"),
        ("{", "not usable"),
        ({"model_type": "qwen3_moe", "hidden_size": "wide"}, "config.json"),
    ],
)
def test_folders_that_are_refused(config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ReapError, match=message) as caught:
        describe_folder(write(tmp_path, config))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ReapError, match="not a model folder: it has no config.json"):
            describe_folder(path)


def test_fewer_experts_than_the_config_says() -> None:
    model = tiny_model("qwen3_moe")
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj[:6].clone())
    with pytest.raises(ReapError, match=r"layers\.1.*config says 8 experts, down_proj holds 6"):
        describe(model)
