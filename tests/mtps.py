"""Tiny checkpoints with a multi-token-prediction layer, and that layer computed by hand."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from folders import add_tensors, edit_config, saved, tensors_of
from safetensors.torch import save_file
from tiny import LAYERS, tiny_model
from torch import Tensor, nn


@dataclass(frozen=True)
class Names:
    """What a family calls its MTP layer's parts; `blocks`: name -> layer of a tiny model."""

    blocks: dict[str, int]
    embedding_norm: str
    hidden_norm: str
    projection: str
    final_norm: str
    experts: str
    one_plus: bool = False  # norms multiply by one plus their weight


LAST = f"model.layers.{LAYERS}"
DEEPSEEK = Names(
    {LAST: LAYERS - 1},
    f"{LAST}.enorm",
    f"{LAST}.hnorm",
    f"{LAST}.eh_proj",
    f"{LAST}.shared_head.norm",
    f"{LAST}.mlp.experts",
)
HUNYUAN = Names(
    {LAST: LAYERS - 1},
    f"{LAST}.enorm",
    f"{LAST}.hnorm",
    f"{LAST}.eh_proj",
    f"{LAST}.final_layernorm",
    f"{LAST}.mlp.experts",
)
_QWEN = (
    {"mtp.layers.0": LAYERS - 1},
    "mtp.pre_fc_norm_embedding",
    "mtp.pre_fc_norm_hidden",
    "mtp.fc",
    "mtp.norm",
    "mtp.layers.0.mlp.experts",
)
NEMOTRON = Names(
    {"mtp.layers.0": 2, "mtp.layers.1": 1},
    "mtp.layers.0.enorm",
    "mtp.layers.0.hnorm",
    "mtp.layers.0.eh_proj",
    "mtp.layers.1.final_layernorm",
    "mtp.layers.1.mixer.experts",
)
FAMILIES = {
    **dict.fromkeys(
        ("deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"), DEEPSEEK
    ),
    "hy_v3": HUNYUAN,
    "qwen3_next": Names(*_QWEN, one_plus=True),
    "qwen3_5_moe": Names(*_QWEN, one_plus=True),
    "mellum": Names(*_QWEN),
    "nemotron_h": NEMOTRON,
}


@dataclass(frozen=True)
class Checkpoint:
    """`model`: what was saved in `folder`. `donor`: a model that holds the MTP layer's blocks among
    its layers."""

    folder: Path
    model: nn.Module
    donor: nn.Module
    names: Names

    @property
    def mtp_tensors(self) -> dict[str, Tensor]:
        own = [*self.names.blocks, "mtp"]
        return {n: t for n, t in tensors_of(self.folder).items() if n.startswith(tuple(own))}


def saved_with_mtp(folder: Path, model_type: str, **overrides: Any) -> Checkpoint:
    """A tiny model, saved with an MTP layer under its family's names."""
    names = FAMILIES[model_type]
    model = saved(folder, model_type, **overrides)
    donor = tiny_model(model_type, seed=7, **overrides)
    donor.save_pretrained(folder / "donor")
    given = tensors_of(folder / "donor")
    for path in (folder / "donor").iterdir():
        path.unlink()
    (folder / "donor").rmdir()
    extra: dict[str, Tensor] = {}
    for block, number in names.blocks.items():
        for name, tensor in given.items():
            place = re.fullmatch(rf".*\.layers\.{number}\.(.*)", name)
            if place:
                extra[f"{block}.{place[1]}"] = tensor
    size = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator, union-attr]
    generator = torch.Generator().manual_seed(3)
    for norm in (names.embedding_norm, names.hidden_norm, names.final_norm):
        extra[f"{norm}.weight"] = torch.rand(size, generator=generator) + 0.5
    weight = torch.randn(size, 2 * size, generator=generator) / (2 * size) ** 0.5
    extra[f"{names.projection}.weight"] = weight
    path = folder / "model.safetensors"
    save_file({**tensors_of(folder), **extra}, path, {"format": "pt"})
    if names.experts.startswith("model"):
        edit_config(folder, num_nextn_predict_layers=1)
    return Checkpoint(folder, model, donor, names)


def computed_by_hand(made: Checkpoint, input_ids: Tensor) -> Tensor:
    """[1,L] -> [1,L-1,H] in fp64: the MTP layer's output for every token that has a next one."""
    model, donor = (copy.deepcopy(each).double() for each in (made.model, made.donor))
    for each in (model, donor):
        each.set_experts_implementation("eager")  # type: ignore[operator]
    stack = donor.get_decoder()  # type: ignore[operator]
    hidden = model.get_decoder()(input_ids=input_ids, use_cache=False)[0]  # type: ignore[operator]
    tensors = {name: x.double() for name, x in made.mtp_tensors.items()}
    eps = float(
        next(
            m.variance_epsilon if hasattr(m, "variance_epsilon") else m.eps
            for n, m in stack.named_modules()
            if n in ("norm", "norm_f")
        )
    )

    def norm(name: str, x: Tensor) -> Tensor:
        weight = tensors[f"{name}.weight"] + (1 if made.names.one_plus else 0)
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight

    following = model.get_input_embeddings()(input_ids[:, 1:])  # type: ignore[operator]
    halves = (
        norm(made.names.embedding_norm, following),
        norm(made.names.hidden_norm, hidden[:, :-1]),
    )
    x = torch.cat(halves, -1) @ tensors[f"{made.names.projection}.weight"].T
    length = x.shape[1]
    mask = torch.full((length, length), -1e30, dtype=x.dtype).triu(1)[None, None]
    positions = torch.arange(length)[None]
    given: dict[str, Any] = {"attention_mask": mask, "position_ids": positions}
    for number in made.names.blocks.values():
        layer = stack.layers[number]
        if hasattr(stack, "rotary_emb"):
            kinds = getattr(stack.config, "layer_types", None)
            per_kind = (
                {"layer_type": kinds[number]} if made.donor.config.model_type == "mellum" else {}
            )
            where = positions
            given["position_embeddings"] = stack.rotary_emb(x, where, **per_kind)
        x = layer(x, **given)
        x = x[0] if isinstance(x, tuple) else x
    return norm(made.names.final_norm, x)
