"""What identifies a model: the same from its modules and from its folder, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import model_types, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from reap.errors import ReapError
from reap.model.identity import describe, describe_folder, fingerprint


@pytest.mark.sweep
@pytest.mark.parametrize("model_type", model_types())
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
