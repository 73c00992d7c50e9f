"""Model folders for tests of checkpoint surgery: saved tiny models, and plans for them."""

from __future__ import annotations

import copy
import json
import random
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from torch import nn

from reap.model.identity import describe_folder
from reap.model.info import LayerInfo, ModelInfo
from reap.planning.plan import Plan

EXPERTS, KEPT = 6, (1, 2, 5)  # of `plan_for`
COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def saved(
    folder: Path, model_type: str = "qwen3_moe", *, shards: bool = False, **overrides: Any
) -> nn.Module:
    """A tiny model, saved to `folder` as transformers saves it."""
    model = tiny_model(model_type, **overrides)
    model.save_pretrained(folder, **({"max_shard_size": "60KB"} if shards else {}))
    return model


def some_plan(
    folder: Path, keep: int = 5, *, seed: int = 0, model: ModelInfo | None = None
) -> Plan:
    """A plan that keeps `keep` experts per layer, others in every layer, equally many per group."""
    model = model or describe_folder(folder)
    rng = random.Random(seed)
    kept: dict[str, tuple[int, ...]] = {}
    tied: dict[str, tuple[int, ...]] = {}
    for layer in model.layers:
        size = layer.num_experts // layer.n_group
        ids = [
            group * size + i
            for group in range(layer.n_group)
            for i in sorted(rng.sample(range(size), keep // layer.n_group))
        ]
        number = re.findall(r"\d+", layer.name)[-1]
        shared = (
            model.model_type == "diffusion_gemma"
        )  # its encoder and decoder share their experts
        kept[layer.name] = tied.setdefault(number, tuple(ids)) if shared else tuple(ids)
    return Plan(model=model, criterion="random", seed=seed, kept=kept)


def plan_for(*names: str, model_type: str = "any", kept: tuple[int, ...] = KEPT) -> Plan:
    """A plan, of no real model, that keeps `kept` of `EXPERTS` experts in each of these layers."""
    layers = tuple(LayerInfo(name, EXPERTS, 2) for name in names)
    model = ModelInfo(model_type, "m", "f", None, layers)
    return Plan(model=model, criterion="random", seed=0, kept=dict.fromkeys(names, kept))


def pruned_in_memory(model: nn.Module, plan: Plan) -> nn.Module:
    """The same removal without any file: a model of the smaller config whose parameters are those
    of `model`,
    with the kept experts selected along the one axis in which the two differ."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    experts, keep = plan.model.layers[0].num_experts, len(next(iter(plan.kept.values())))
    for key in COUNT_KEYS:
        if getattr(text, key, None) == experts:
            setattr(text, key, keep)
    small = type(model)(config)
    old, new = model.state_dict(), {}
    for name, target in small.state_dict().items():
        value = old[name]
        axes = [i for i, (a, b) in enumerate(zip(value.shape, target.shape, strict=True)) if a != b]
        if axes:
            (layer,) = re.findall(r"layers\.\d+\.", name)
            kept = next(ids for layer_name, ids in plan.kept.items() if layer in layer_name)
            tail = range(experts, value.shape[axes[0]])  # a skip class, shared experts
            value = value.index_select(axes[0], torch.tensor([*kept, *tail]))
        new[name] = value
    small.load_state_dict(new)
    return small.to(next(model.parameters()).dtype).eval()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, read by the library; checks the index on the way."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    found: dict[str, torch.Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        tensors = load_file(folder / shard)
        assert {n for n, s in weight_map.items() if s == shard} == set(tensors)
        found |= tensors
    return found


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def add_tensors(folder: Path, **tensors: torch.Tensor) -> None:
    """More tensors in a single-file checkpoint; `__` in a name stands for a dot."""
    path = folder / "model.safetensors"
    named = {name.replace("__", "."): t for name, t in tensors.items()}
    save_file({**load_file(path), **named}, path, {"format": "pt"})
