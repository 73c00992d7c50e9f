"""Layers with different numbers of experts: how a config.json says so.

The configurations of transformers and of servers have one number for all layers. A checkpoint that
keeps different numbers says so in words of our own, and under a model type and an architecture that
nobody else has. So whatever reads the file without us stops with an error that names the type,
instead of making a model of another shape:

    "model_type": "reap_experts_per_layer",
    "architectures": ["ReapExpertsPerLayer"],
    "reap_experts_per_layer": {
      "model_type": "qwen3_moe",                       what it was
      "architectures": ["Qwen3MoeForCausalLM"],
      "experts": {"model.layers.0.mlp.experts": 96, ...}   in the order of the layers
    },
    "num_experts": 112,                                the largest of them

`reap.load_model` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reap.errors import ReapError

KEY = "reap_experts_per_layer"
MODEL_TYPE, ARCHITECTURE = KEY, "ReapExpertsPerLayer"


def written(config: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, Any]:
    """The config of a model whose layers have `counts` experts, from one in which the largest of
    them is the number of all. Where all are equal, that config."""
    plain = restored(config)
    plain.pop(KEY, None)
    if len(set(counts.values())) == 1:
        return plain
    names = ("model_type", "architectures")
    return {
        **plain,
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        KEY: {**{name: plain.get(name) for name in names}, "experts": dict(counts)},
    }


def restored(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config in the words of its architecture, our key still in it. ReapError when that is
    damaged."""
    counts_in(config)
    if config.get("model_type") != MODEL_TYPE:
        return dict(config)
    names = ("model_type", "architectures")
    return {**config, **{name: config[KEY][name] for name in names}}


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
    kinds = ("model_type", str), ("architectures", list | None)
    if not whole or not all(isinstance(said.get(name), kind) for name, kind in kinds):
        raise ReapError(f"config.json: {KEY} is damaged: write the checkpoint again")
    return dict(counts)


def counts_of(config: Any) -> tuple[int, ...]:
    """The same of a configuration that transformers made of the file."""
    said = getattr(config, KEY, None)
    return tuple(counts_in({KEY: said}).values()) if said is not None else ()
