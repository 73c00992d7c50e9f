from dataclasses import replace

import pytest

from reap.errors import ReapError
from reap.model.info import LayerInfo, ModelInfo

LAYER = LayerInfo("model.layers.0.mlp.experts", 8, 2, n_group=4, topk_group=2, min_per_group=2)
MODEL = ModelInfo("deepseek_v3", "some/model", "f" * 64, "a" * 64, (LAYER,))


def test_json_round_trip():
    assert ModelInfo.from_json(MODEL.to_json()) == MODEL
    assert LayerInfo.from_json({"name": "x", "num_experts": 4, "top_k": 1}) == LayerInfo("x", 4, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 0}, "num_experts of layer model.layers.0.mlp.experts is 0"),
        ({"num_experts": 2**70}, "more than 65536"),
        ({"top_k": 9}, "top_k 9 exceeds its 8 experts"),
        ({"top_k": 2.0}, "must be of type int"),
        ({"top_k": True}, "must be of type int"),
        ({"n_group": 3}, "8 experts do not split into 3 equal groups"),
        ({"topk_group": 5}, "topk_group 5 exceeds its 4 groups"),
        ({"name": None}, "layer name is None"),
        ({"colour": 1}, "unknown field 'colour'"),
    ],
)
def test_bad_layers(change, message):
    with pytest.raises(ReapError, match=message):
        LayerInfo.from_json({**LAYER.to_json(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": None}, "layers must be a list"),
        ({"layers": [LAYER.to_json()] * 2}, "names a MoE layer twice"),
        ({"layers": [1]}, "layer description is a int"),
        ({"fingerprint": 1}, "model fingerprint is 1"),
        ({"weights": 1}, "model weights is 1"),
    ],
)
def test_bad_models(change, message):
    with pytest.raises(ReapError, match=message):
        ModelInfo.from_json({**MODEL.to_json(), **change})


def test_a_missing_field_is_named():
    data = MODEL.to_json()
    del data["fingerprint"]
    with pytest.raises(ReapError, match="lacks 'fingerprint'"):
        ModelInfo.from_json(data)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (replace(MODEL, model_type="mixtral"), "model type deepseek_v3 against mixtral"),
        (replace(MODEL, layers=()), "1 MoE layers against 0"),
        (replace(MODEL, layers=(replace(LAYER, top_k=4),)), "top_k 2 against 4"),
        (replace(MODEL, layers=(replace(LAYER, name="b"),)), "against b"),
        (replace(MODEL, fingerprint="e" * 64), "config fingerprint ffff"),
        (replace(MODEL, weights="b" * 64), "weights aaaa"),
    ],
)
def test_differences_are_named(other, message):
    assert message in str(MODEL.difference(other))


def test_names_and_unknown_weights_are_no_difference():
    assert MODEL.difference(replace(MODEL, name="/elsewhere", weights=None)) is None


def test_layer_by_name():
    assert MODEL.layer(LAYER.name) is LAYER
    with pytest.raises(ReapError, match="no MoE layer called 'x'"):
        MODEL.layer("x")
