"""What identifies a model: the same from its modules and from its folder, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import add_tensors, edit_config
from mtps import saved_with_mtp
from tiny import model_types, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from reap import versions
from reap.errors import ReapError
from reap.model.identity import describe, describe_folder, fingerprint, mtp_of
from reap.model.load import load_model, load_mtp

# A plain model, a composite, a hybrid, tied layers, a state from layer to layer, no head: the
# others are in the slow tests.
QUICK = ("qwen3_moe", "gemma4", "nemotron_h", "diffusion_gemma", "zaya", "openai_privacy_filter")


@pytest.mark.parametrize(
    "model_type",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in model_types()
    ],
)
def test_a_folder_is_described_as_its_model(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    info = describe(model)
    assert info.weights is None and info.layers
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    assert describe_folder(tmp_path, like=info).difference(info) is None


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


def other_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in another release of transformers: configurations have a field more, and say so."""
    before = PreTrainedConfig.to_dict
    monkeypatch.setattr(
        PreTrainedConfig, "to_dict", lambda self: {**before(self), "new_default": True}
    )
    monkeypatch.setattr(versions, "_installed", lambda package: "99.0")


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen3_5_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("saved", [True, False])
def test_a_model_is_the_same_under_another_transformers(
    model_type: str, saved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(model_type)
    if saved:
        model.save_pretrained(tmp_path)
    before = describe_folder(tmp_path) if saved else describe(model)
    other_defaults(monkeypatch)
    after = describe_folder(tmp_path) if saved else describe(model)
    assert before.fingerprint != after.fingerprint
    assert before.difference(after) is None is after.difference(before)
    if saved:
        assert not before.notes(after)


def test_what_is_known_of_a_folder_and_of_modules(tmp_path: Path) -> None:
    model = tiny_model("qwen3_5_moe")
    model.save_pretrained(tmp_path)
    alone, folder = describe(model).structure, describe_folder(tmp_path).structure
    assert alone is not None and folder is not None and alone.modules == folder.modules
    assert set(alone.modules) == {
        "vocab_size", "embedding_size", "layers", "parameters of a layer's experts"
    }  # fmt: skip
    assert not alone.config and folder.config["num_experts"] == 8
    assert not any("vision" in name for name in folder.config)
    (router, *_) = folder.routers
    assert router.endswith("mlp.gate.weight")
    pattern = next(name for name in folder.tensors if name.endswith("mlp.gate.weight"))
    assert ".*." in pattern and folder.tensors[pattern] == ("F32 [8, 32]",)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vocab_size": 80}, "vocab_size"),
        ({"hidden_size": 64}, "embedding_size|hidden_size"),
        ({"moe_intermediate_size": 48}, "parameters of a layer's experts|moe_intermediate_size"),
    ],
)
def test_other_sizes_are_named(sizes: dict[str, int], message: str, tmp_path: Path) -> None:
    model, other = tiny_model("qwen3_moe"), tiny_model("qwen3_moe", **sizes)
    info = replace(describe(model), transformers="5.7.0")
    assert re.match(f"({message}) \\d+ against \\d+", info.difference(describe(other)) or "")
    model.save_pretrained(tmp_path / "a")
    other.save_pretrained(tmp_path / "b")
    info, folder = describe_folder(tmp_path / "a"), describe_folder(tmp_path / "b")
    assert re.match(f"({message}) \\d+ against \\d+", info.difference(folder) or "")


def test_a_field_that_only_the_config_has_is_named(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    before = describe_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    write(tmp_path, {**config, "norm_topk_prob": not config["norm_topk_prob"]})
    assert "norm_topk_prob" in (before.difference(describe_folder(tmp_path)) or "")


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
        ("{", "not valid JSON"),
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


@pytest.mark.parametrize("model_type", ["glm4_moe", "qwen3_5_moe"])
def test_the_mtp_layer_is_described_when_it_is_asked_for(model_type: str, tmp_path: Path) -> None:
    """By itself, or because another description has it."""
    made = saved_with_mtp(tmp_path, model_type)
    plain, whole = describe_folder(tmp_path), describe_folder(tmp_path, mtp=True)
    assert whole.layers[:-1] == plain.layers and whole.layers[-1].name == made.names.experts
    model = load_model(tmp_path)
    assert describe(model, mtp=load_mtp(model)).difference(whole) is None
    for like in (plain, whole):
        assert describe_folder(tmp_path, like=like) == like
    moved = replace(
        whole, layers=tuple(replace(one, name=f"moved.{one.name}") for one in whole.layers)
    )
    found = describe_folder(tmp_path, like=moved)
    assert found.difference(moved, to_prune=True) is None


def test_what_is_said_of_a_folders_mtp_layer(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    assert mtp_of(tmp_path) == (None, None)
    add_tensors(tmp_path, mtp__layers__0__mlp__experts__0__up_proj__weight=torch.ones(2))
    assert mtp_of(tmp_path) == (None, "mtp: it is not known how qwen3_moe models run it")
    made = saved_with_mtp(tmp_path / "known", "hy_v3")
    assert mtp_of(made.folder, made.model.config) == mtp_of(made.folder) == ("model.layers.4", None)
    edit_config(tmp_path, model_type="unheard_of")
    assert mtp_of(tmp_path) == (None, None)
