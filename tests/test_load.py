"""Loading a model: where it goes, and one line for everything that is wrong with a folder."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mtps import saved_with_mtp
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers.utils import logging

from reap.errors import ReapError
from reap.model.identity import describe, describe_folder
from reap.model.load import load_model, load_mtp, load_tokenizer
from reap.model.mtp import UnsupportedMtpError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("qwen3_moe", dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)]
)
def test_dtypes(folder: Path, dtype: str, expected: torch.dtype) -> None:
    model = load_model(folder, dtype=dtype)
    assert model.dtype == expected and not model.training


def test_a_device_without_accelerate(folder: Path, monkeypatch: Any) -> None:
    """It is not among our dependencies, and transformers places nothing without it."""
    find = importlib.util.find_spec
    without = lambda name: None if name == "accelerate" else find(name)  # noqa: E731
    monkeypatch.setattr("reap.model.load.find_spec", without)
    assert load_model(folder, device="meta").device.type == "meta"
    assert load_model(folder, device="cpu:0").device.type == "cpu"


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "openai_privacy_filter", "dots3_note"])
def test_a_model_is_loaded_as_its_folder_is_described(model_type: str, tmp_path: Path) -> None:
    """Composite, a token classifier that no auto class of ours knows, a language model in one."""
    tiny_model(model_type).save_pretrained(tmp_path)
    assert describe(load_model(tmp_path)).difference(describe_folder(tmp_path)) is None


def edited(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def without(folder: Path, ending: str) -> None:
    path = folder / "model.safetensors"
    tensors = {name: x for name, x in load_file(path).items() if not name.endswith(ending)}
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: without(f, "layers.1.mlp.experts.3.up_proj.weight"), "layers.1.mlp.experts.*"),
        (lambda f: without(f, "layers.2.mlp.gate.weight"), r"1 weights are missing.*2\.mlp\.gate"),
        (lambda f: edited(f, hidden_size=64), "does not load: .* has the wrong shape"),
        (lambda f: edited(f, model_type="nonsense"), "config.json is not usable"),
        (lambda f: edited(f, model_type="t5", architectures=[]), "no language model of type t5"),
        (lambda f: (f / "model.safetensors").unlink(), "model"),
    ],
    ids=["an expert", "a router", "shapes", "an unknown type", "another type", "no weights"],
)
def test_damaged_folders(folder: Path, damage: Any, message: str, capfd: Any) -> None:
    """And nothing on the terminal but what we say: no table, no traceback."""
    damage(folder)
    level = logging.get_verbosity()
    capfd.readouterr()
    with pytest.raises(ReapError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert capfd.readouterr().err == "" and logging.get_verbosity() == level


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8': it must be one of auto"),
        ({"device": "nonsense"}, "device 'nonsense' is not usable"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not usable"),
    ],
)
def test_options_that_are_refused(folder: Path, options: Any, message: str) -> None:
    with pytest.raises(ReapError, match=message):
        load_model(folder, **options)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ReapError, match="no tokenizer that loads"):
        load_tokenizer(tmp_path)


def test_the_mtp_layer_of_a_folder(tmp_path: Path) -> None:
    """None where there is none; from another folder where the model does not know its own."""
    tiny_model("glm4_moe").save_pretrained(tmp_path / "plain")
    model = load_model(tmp_path / "plain")
    assert load_mtp(model) is None
    made = saved_with_mtp(tmp_path / "model", "glm4_moe")
    found, same = load_mtp(load_model(made.folder)), load_mtp(made.model, made.folder)
    assert found is not None and same is not None and found.layers == same.layers
    assert torch.equal(found.projection.weight, same.projection.weight)
    with pytest.raises(ReapError, match="Glm4MoeForCausalLM is no folder here.*say the folder of"):
        load_mtp(tiny_model("glm4_moe"))


LAST = "model.layers.4."


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (f"{LAST}eh_proj.weight", None),
        (f"{LAST}hnorm.weight", None),
        (f"{LAST}shared_head.norm.weight", None),
        (f"{LAST}mlp.experts.3.up_proj.weight", None),
        (f"{LAST}self_attn.q_proj.weight", None),
        (f"{LAST}eh_proj.weight", lambda weight: weight[:, :-1]),
        (f"{LAST}eh_proj.weight", lambda weight: weight.to(torch.int8)),
        (f"{LAST}self_attn.q_proj.weight", lambda weight: weight[:-1]),
        (f"{LAST}eh_proj.bias", lambda _: torch.zeros(32)),
        (f"{LAST}mlp.gain", lambda _: torch.zeros(32)),
    ],
)
def test_an_mtp_layer_that_is_not_whole(name: str, change: Any, tmp_path: Path) -> None:
    saved_with_mtp(tmp_path, "glm4_moe")
    model = load_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name] = tensors.get(name, torch.zeros(0))
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedMtpError, match=r"^model.layers.4"):
        load_mtp(model)
