"""Layers with different numbers of experts: how a config.json says so.

The configurations of transformers and of servers have one number for all layers. A checkpoint that
keeps different numbers says so in words of our own, and under a model type and an architecture that
nobody else has, and the one number is none. So whatever reads the file without us stops with an
error that names what it did not understand, instead of making a model of another shape:

    "model_type": "reap_experts_per_layer",
    "architectures": ["ReapExpertsPerLayer"],
    "reap_experts_per_layer": {
      "of_model_type": "qwen3_moe",
      "of_architectures": ["Qwen3MoeForCausalLM"],
      "experts": {"model.layers.0.mlp.experts": 96, ...},   in the order of the layers
      "largest": {"num_experts": 112}                       by dotted name
    },
    "num_experts": "see reap_experts_per_layer"

`reap.load_model` reads it. (No `model_type` may be in there: transformers takes a dictionary with
the type that it wants for the whole configuration, and would make a model of default size.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from reap.errors import ReapError

KEY = "reap_experts_per_layer"
MODEL_TYPE, ARCHITECTURE = KEY, "ReapExpertsPerLayer"
_DAMAGED = f"config.json: {KEY} is damaged: write the checkpoint again"
_NAMES = ("model_type", "architectures")  # which are ours, and beside the counts as they were


def written(
    config: Mapping[str, Any], counts: Mapping[str, int], places: Iterable[tuple[str, ...]]
) -> dict[str, Any]:
    """The config of a model whose layers have `counts` experts, from one that has the largest of
    them, as the number of all, in these `places`. Without places, that config."""
    new = restored(config)
    new.pop(KEY, None)
    largest = {}
    for place in places:
        largest[".".join(place)] = _exchanged(new, place, f"see {KEY}")
    if not largest:
        return new
    said: dict[str, Any] = {f"of_{name}": new.get(name) for name in _NAMES}
    said |= {"experts": dict(counts), "largest": largest}
    return {**new, "model_type": MODEL_TYPE, "architectures": [ARCHITECTURE], KEY: said}


def _exchanged(config: dict[str, Any], place: tuple[str, ...], value: Any) -> Any:
    """Put a value where the path `place` leads in a config; what was there."""
    for step in place[:-1]:
        config = config[step]
    before, config[place[-1]] = config.get(place[-1]), value
    return before


def restored(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config in the words of its architecture, our key still in it. ReapError when that is
    damaged."""
    counts_in(config)
    new = copy.deepcopy(dict(config))
    if config.get("model_type") != MODEL_TYPE:  # transformers saved what we had loaded
        return new
    said = config[KEY]
    try:
        for name, value in said["largest"].items():
            _exchanged(new, tuple(name.split(".")), value)
    except (AttributeError, KeyError, TypeError) as error:
        raise ReapError(_DAMAGED) from error
    return {**new, **{name: said[f"of_{name}"] for name in _NAMES}}


def counts_in(config: Mapping[str, Any]) -> dict[str, int]:
    """The experts of each layer, in the order of the layers, where the config says so; else none.

    ReapError when what it says is damaged.
    """
    if config.get(KEY) is None and config.get("model_type") != MODEL_TYPE:
        return {}
    said = config.get(KEY)
    said = said if isinstance(said, Mapping) else {}
    counts = said.get("experts")
    counts = counts if isinstance(counts, Mapping) else {}
    whole = counts and all(type(n) is int and n > 0 for n in counts.values())
    kinds = ("of_model_type", str), ("of_architectures", list | None)
    if not whole or not all(isinstance(said.get(name), kind) for name, kind in kinds):
        raise ReapError(_DAMAGED)
    return dict(counts)


def counts_of(config: Any) -> tuple[int, ...]:
    """The same of a configuration that transformers made of the file."""
    said = getattr(config, KEY, None)
    return tuple(counts_in({KEY: said}).values()) if said is not None else ()
