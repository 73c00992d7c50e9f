import json
from dataclasses import replace
from typing import Any

import pytest

from reap.errors import ReapError
from reap.model.info import LayerInfo, ModelInfo
from reap.model.structure import Structure

LAYER = LayerInfo("model.layers.0.mlp.experts", 8, 2, n_group=4, topk_group=2, min_per_group=2)
MODEL = ModelInfo("deepseek_v3", "some/model", "f" * 64, "a" * 64, (LAYER,))
FACTS: dict[str, Any] = {
    "config": {"hidden_size": 4, "norm_topk_prob": False, "max_position_embeddings": 64},
    "tensors": {"m.*.gate.weight": ("BF16 [8, 4]",), "m.*.up.weight": ("BF16 [8, 4]",)},
    "routers": {"m.0.gate.weight": ("BF16", "r", "n")},
    "modules": {"vocab_size": 6},
}
NOTHING = Structure().to_json()
FULL = replace(MODEL, structure=Structure(**FACTS), transformers="5.7.0")


def known(**facts):
    """The same model, of which only these facts are known."""
    return replace(FULL, structure=Structure(**facts))


def test_json_round_trip():
    for model in (MODEL, FULL):
        data = json.loads(json.dumps(model.to_json()))
        assert ModelInfo.from_json(data) == model
        assert ModelInfo.from_json(data).transformers == model.transformers
    assert set(MODEL.to_json()) == {"model_type", "name", "fingerprint", "weights", "layers"}
    assert ModelInfo.from_json(MODEL.to_json(), transformers="5.1").transformers == "5.1"
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
        ({"structure": 1}, "model structure must be an object of config, tensors"),
        ({"structure": {**NOTHING, "config": []}}, "structure: config must be an object"),
        ({"structure": {**NOTHING, "tensors": {"a": [1]}}}, "tensors 'a' must be a list of str"),
        ({"structure": {**NOTHING, "routers": {"a": ["b"]}}}, "'a' must have three entries"),
        ({"structure": {**NOTHING, "modules": {"layers": "1"}}}, "layers is '1'"),
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
        (replace(MODEL, layers=()), "layers.0.mlp.experts in one alone"),
        (replace(MODEL, layers=(replace(LAYER, top_k=4),)), "top_k 2 against 4"),
        (replace(MODEL, layers=(replace(LAYER, name="b"),)), "against b"),
        (replace(MODEL, weights="b" * 64), "other weights; a file of an earlier version does"),
        (replace(FULL, weights="b" * 64), "other weights of the same structure and data types"),
        (known(config={"hidden_size": 8}), "hidden_size 4 against 8"),
        (known(config={"rope.a": 1, "norm_topk_prob": True}), "norm_topk_prob false against true"),
        (known(modules={"vocab_size": 5}), "vocab_size 6 against 5"),
        (
            known(tensors={"m.*.gate.weight": ("F32 [9, 4]",)}),
            "tensor m.*.gate.weight [8, 4] against [9, 4]",
        ),
        (
            known(routers={"m.0.gate.weight": ("BF16", "r2", "n")}),
            "other weights: the router m.0.gate.weight of BF16 holds other values",
        ),
    ],
)
def test_differences_are_named(other, message):
    mine = FULL if other.structure else MODEL
    for to_prune in (False, True):
        assert message in str(mine.difference(other, to_prune=to_prune))


@pytest.mark.parametrize(
    "facts",
    [
        {"config": {"head_dim": 2}},  # the other does not say
        {"config": {"max_position_embeddings": 4096}},
        {"tensors": {"m.*.up.weight": ("U8 [8, 2]",)}},  # packed
        {"tensors": {"m.*.up.weight_scale": ("F32 [1]",)}},
        {"routers": {"m.0.gate.weight": ("BF16", "r2", "n2")}},  # scaled against its norm
        {"routers": {"m.0.gate.weight": ("F32", "r2", "n")}},
    ],
)
def test_what_cannot_be_told_is_no_difference(facts):
    assert FULL.difference(known(**facts), to_prune=True) is None
    assert known(**facts).difference(FULL, to_prune=True) is None


def test_another_precision_is_a_note_where_it_is_allowed():
    other = replace(known(tensors={"m.*.gate.weight": ("F8_E4M3 [8, 4]",)}), weights="b")
    said = "the same structure in other data types: BF16 against F8_E4M3"
    assert FULL.difference(other) == said and FULL.difference(other, to_prune=True) is None
    assert FULL.notes(other) == [
        "another precision of the same structure: BF16 against F8_E4M3",
    ]
    longer = known(config={"max_position_embeddings": 9})
    assert FULL.notes(longer) == ["max_position_embeddings is 64 there and 9 here"]
    assert FULL.notes(FULL) == []


def test_layers_under_another_module_are_the_same():
    moved = replace(LAYER, name="model.language_model.layers.0.mlp.experts")
    other = replace(FULL, layers=(moved,))
    assert FULL.difference(other) is None is other.difference(FULL)
    later = replace(FULL, layers=(replace(moved, name="m.layers.1.mlp.experts"),))
    assert "layer layers.0.mlp.experts against layers.1" in str(FULL.difference(later))
    two = replace(FULL, layers=(LAYER, later.layers[0]))
    assert "layers.1.mlp.experts in one alone, as where one has the layer of multi-token" in str(
        two.difference(FULL)
    )
    fewer = replace(FULL, layers=(replace(moved, num_experts=4),))
    assert "num_experts 8 against 4" in str(FULL.difference(fewer, to_prune=True))


def test_fingerprints_count_only_within_one_release_of_transformers():
    """Those of files of version 1 hold the defaults of the release that they were written with."""
    other = replace(MODEL, fingerprint="e" * 64)
    assert MODEL.difference(other) is None
    (note,) = MODEL.notes(other)
    assert "layers and weights agree, other fields of the configuration were not compared" in note
    old, new = (replace(m, transformers="5.7.0") for m in (MODEL, other))
    assert "a field of the configuration" in str(old.difference(new))
    assert old.difference(replace(new, transformers="5.8.0")) is None
    written = replace(FULL, fingerprint="e" * 64)
    assert FULL.difference(written) is None and FULL.notes(written) == []


def test_names_and_unknown_weights_are_no_difference():
    assert MODEL.difference(replace(MODEL, name="/elsewhere", weights=None)) is None


def test_layer_by_name():
    assert MODEL.layer(LAYER.name) is LAYER
    with pytest.raises(ReapError, match="no MoE layer called 'x'"):
        MODEL.layer("x")
