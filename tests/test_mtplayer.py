"""The MTP layer as a module: against the same computed by hand, for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import tensors_of
from mtps import FAMILIES, computed_by_hand, saved_with_mtp
from tiny import tiny_inputs

from reap.model.load import load_model, load_mtp
from reap.model.mtplayer import Mtp, mtp_on_meta


def loaded(folder: Path) -> tuple[Any, Mtp]:
    model = load_model(folder)
    # With others the sparse attention of transformers 5.7 is given no mask and sees what follows.
    model.set_attn_implementation("eager")
    mtp = load_mtp(model)
    assert mtp is not None
    return model, mtp


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_same_as_by_hand(model_type: str, tmp_path: Path) -> None:
    made = saved_with_mtp(tmp_path, model_type)
    model, mtp = loaded(tmp_path)
    ids = tiny_inputs(model, batch=1)["input_ids"]
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=ids, use_cache=False)[0]
        found = mtp(hidden[:, :-1], model.get_input_embeddings()(ids)[:, 1:])
        other = mtp(model.get_input_embeddings()(ids)[:, 1:], hidden[:, :-1])
    expected, _ = computed_by_hand(made, ids)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert (other.double() - expected).abs().max() > 0.1, "the order of the halves matters"
    (layer,) = mtp.layers
    assert layer.name == made.names.experts and layer.num_experts == 8 and layer.top_k == 2


def test_sliding_attention_where_the_configuration_says_so(tmp_path: Path) -> None:
    made = saved_with_mtp(tmp_path, "mellum", num_mtp_layers=1)
    assert made.model.config.mtp_layer_types == ["sliding_attention"]
    model, mtp = loaded(tmp_path)
    assert mtp.stack.config.layer_types == ["sliding_attention"]


def test_without_weights_it_is_the_same_layer(tmp_path: Path) -> None:
    saved_with_mtp(tmp_path, "glm4_moe")
    model, mtp = loaded(tmp_path)
    made = mtp_on_meta(model, tensors_of(tmp_path))
    assert made is not None and made.layers == mtp.layers


def test_dtype_and_device_are_the_models(tmp_path: Path) -> None:
    saved_with_mtp(tmp_path, "glm4_moe")
    mtp = load_mtp(load_model(tmp_path, dtype="bfloat16"))
    assert mtp is not None and not mtp.training
    assert {mtp.projection.weight.dtype, mtp.hidden_norm.weight.dtype} == {torch.bfloat16}
