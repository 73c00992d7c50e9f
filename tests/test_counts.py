"""Where a config counts experts, and what it says afterwards."""

from __future__ import annotations

from reap.checkpoint import counts


def test_only_the_config_that_counts_these_experts_changes() -> None:
    config = {
        "thinker_config": {"text_config": {"num_experts": 6}},
        "talker_config": {"text_config": {"num_experts": 6}},
        "quantization_config": {"num_experts": 6},
    }
    places = counts.places_of(config, "thinker.model.layers.0.mlp.experts", 0, 6)
    assert [str(p) for p in places] == ["thinker_config.text_config.num_experts"]
    new, changes = counts.with_fewer(config, {places[0]: {0: 3}}, drop_extra=False)
    assert new == {**config, "thinker_config": {"text_config": {"num_experts": 3}}}
    assert changes == ["thinker_config.text_config.num_experts: 6 -> 3"]


def test_a_stale_copy_beside_the_sub_config_changes_too() -> None:
    config = {
        "num_experts": 6,
        "text_config": {"num_experts": 6},
        "vision_config": {"num_experts": 4},
    }
    places = counts.places_of(config, "model.language_model.layers.0.mlp.experts", 0, 6)
    assert {str(p) for p in places} == {"num_experts", "text_config.num_experts"}


def test_a_list_with_one_count_per_layer() -> None:
    assert not list(counts.places({"num_experts": []}))
    config = {"num_experts": [6, 8, 6], "num_hidden_layers": 3}
    (place,) = counts.places_of(config, "model.layers.1.mlp.experts", 1, 8)
    new, _ = counts.with_fewer(config, {place: {1: 4}}, drop_extra=False)
    assert new["num_experts"] == [6, 4, 6]


def test_a_table_with_a_config_per_layer() -> None:
    """A number elsewhere in a path is not that of a layer."""
    config = {
        "num_experts": 6,
        "per_layer_config": {"0": {"num_experts": 6}, "1": {"num_experts": 6}},
    }
    (place,) = counts.places_of(config, "model.layers.1.mlp.experts", 1, 6)
    assert place == counts.Place(("per_layer_config", "1"), "num_experts", 1)
    (place,) = counts.places({"towers": {"1": {"num_experts": 6}}})
    assert place.layer is None
