"""A model whose layers come and go: what is where, and which models cannot be had so."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from folders import saved, tensors_of
from safetensors.torch import save_file
from tiny import tiny_model
from torch import nn

from reap.errors import ReapError
from reap.model.layerwise import Layerwise, Needs
from reap.model.load import load_model


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[Layerwise]:
    layers = Layerwise(folder, **options)
    try:
        yield layers
    finally:
        layers.close()


def on_meta(model: nn.Module) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.is_meta}


def assert_same_weights(layers: Layerwise, whole: nn.Module) -> None:
    """Every layer that is loaded has the weights that it has in the model that is loaded whole."""
    expected = dict(whole.named_parameters(remove_duplicate=False))
    base = layers.model.base_model
    for unit in layers.units:
        before = on_meta(base)
        with layers.loaded(unit):
            assert not on_meta(unit.module)
            for name, weight in unit.module.named_parameters():
                other = expected[f"{unit.name}.{name}"]
                assert weight.dtype == other.dtype and torch.equal(weight, other)
        assert on_meta(base) == before
    for name, weight in base.named_parameters():
        if not weight.is_meta:
            assert torch.equal(weight, whole.base_model.get_parameter(name))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "gemma4", "diffusion_gemma"])
def test_layers_come_and_go(tmp_path: Path, model_type: str) -> None:
    saved(tmp_path, model_type, shards=True)
    with opened(tmp_path) as layers:
        assert_same_weights(layers, load_model(tmp_path, device="cpu"))


def test_what_stays_and_what_is_never_read(tmp_path: Path) -> None:
    """The embeddings and buffers stay; the head, unless it is the embeddings, does not run."""
    saved(tmp_path, "qwen3_moe", tie_word_embeddings=False)
    with opened(tmp_path) as layers:
        stays = {name for name, weight in layers.model.named_parameters() if not weight.is_meta}
        assert stays == {"model.embed_tokens.weight", "model.norm.weight"}
        assert [unit.name for unit in layers.units] == [f"model.layers.{i}" for i in range(4)]
        assert all(unit.has_experts and unit.nbytes == layers.stored(unit) for unit in layers.units)
    saved(tmp_path, "qwen3_moe", tie_word_embeddings=True)
    with opened(tmp_path) as layers:
        assert "lm_head.weight" not in on_meta(layers.model)


def test_reading_ahead(tmp_path: Path) -> None:
    """What was read ahead is used, also when it was for another layer than the one that comes."""
    saved(tmp_path)
    whole = load_model(tmp_path, device="cpu").get_parameter
    with opened(tmp_path) as layers:
        for ahead, now in [(0, 0), (1, 1), (2, 0), (3, 3)]:
            layers.read_ahead(layers.units[ahead])
            layers.read_ahead(layers.units[ahead])
            with layers.loaded(layers.units[now]):
                name = f"model.layers.{now}.mlp.experts.gate_up_proj"
                assert torch.equal(layers.model.get_parameter(name), whole(name))


def test_another_dtype(tmp_path: Path) -> None:
    saved(tmp_path)
    whole = load_model(tmp_path, device="cpu", dtype="bfloat16")
    with opened(tmp_path, dtype="bfloat16") as layers:
        assert_same_weights(layers, whole)


def quantised(folder: Path, kind: str) -> None:
    """A checkpoint of packed weights."""
    model_type = "gpt_oss" if kind == "mxfp4" else "qwen3_moe"
    size = "intermediate_size" if kind == "mxfp4" else "moe_intermediate_size"
    options: dict[str, Any] = {"dtype": torch.bfloat16, size: 32}
    saved(folder, model_type, **options)
    tensors: dict[str, torch.Tensor] = {}
    draw = torch.Generator().manual_seed(0)
    for name, weight in tensors_of(folder).items():
        if kind == "mxfp4" and re.search(r"experts\.(gate_up|down)_proj$", name):
            experts, inner, outer = weight.shape
            blocks = (experts, outer, inner // 32)
            tensors[f"{name}_blocks"] = torch.randint(
                256, (*blocks, 16), generator=draw, dtype=torch.uint8
            )
            tensors[f"{name}_scales"] = torch.randint(
                118, 124, blocks, generator=draw, dtype=torch.uint8
            )
        elif kind == "fp8" and name.endswith("_proj.weight"):
            rows, columns = weight.shape
            blocks_of = weight.float().view(rows // 4, 4, columns // 4, 4)
            scale = blocks_of.abs().amax((1, 3)) / 448
            packed = (blocks_of / scale[:, None, :, None]).view(rows, columns)
            tensors[name] = packed.to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": kind, "weight_block_size": [4, 4]}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_packed_weights_are_unpacked_layer_by_layer(tmp_path: Path, kind: str) -> None:
    quantised(tmp_path, kind)
    with opened(tmp_path) as layers:
        assert layers.units[1].nbytes > layers.stored(layers.units[1])
        assert_same_weights(layers, load_model(tmp_path, device="cpu"))


def test_weights_that_stay_packed_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    saved(tmp_path)
    monkeypatch.setattr("reap.model.compat.is_quantised", lambda model: True)
    with pytest.raises(ReapError, match="is quantised, and transformers computes with its packed"):
        Layerwise(tmp_path)


def test_tied_layers_that_are_stored_twice_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, "diffusion_gemma")
    tensors = tensors_of(tmp_path)
    name = "model.decoder.layers.0.self_attn.q_proj.weight"
    twin = name.replace("decoder", "encoder.language_model")
    save_file(tensors | {twin: tensors[name].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ReapError, match=f"{twin} and {name} are tied, but the checkpoint has both"):
        Layerwise(tmp_path)


def test_experts_in_no_list_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    saved(tmp_path, "mixtral")
    original = transformers.MixtralModel.__init__

    def without_a_list(self: Any, config: Any) -> None:
        original(self, config)
        layers = self._modules.pop("layers")
        self.layers = nn.ModuleDict({f"n{i}": layer for i, layer in enumerate(layers)})

    monkeypatch.setattr(transformers.MixtralModel, "__init__", without_a_list)
    with pytest.raises(
        ReapError, match="MixtralForCausalLM cannot be run layer by layer: .*no lis"
    ):
        Layerwise(tmp_path)


def test_a_layer_that_is_not_whole_is_said_before_any_work(tmp_path: Path) -> None:
    saved(tmp_path, "mixtral")
    tensors = tensors_of(tmp_path)
    del tensors["model.layers.2.input_layernorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ReapError, match="1 weights are missing, such as model.layers.2.input_layer"
    ):
        Layerwise(tmp_path)


def test_what_it_needs_is_told_before_anything_is_read(tmp_path: Path, monkeypatch: Any) -> None:
    saved(tmp_path)
    told: list[Needs] = []

    def admit(needs: Needs) -> None:
        told.append(needs)
        raise ReapError("too much")

    monkeypatch.setattr("reap.model.stored.Stored.read", None)
    with pytest.raises(ReapError, match="too much"):
        Layerwise(tmp_path, admit=admit)
    one = tiny_model("qwen3_moe").model.layers[0]
    layer = 2 * sum(weight.nbytes for weight in one.parameters())
    assert told == [Needs(told[0].stays, layer, "model.layers.0")] and told[0].stays > 0
