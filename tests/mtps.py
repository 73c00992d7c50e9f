"""Tiny checkpoints with a multi-token-prediction layer, and that layer computed by hand."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from brute import Truth, brute_force
from folders import edit_config, saved, tensors_of
from safetensors.torch import save_file
from tiny import LAYERS, tiny_model
from torch import Tensor


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

EACH_ROW = ("glm4_moe", "hy_v3", "qwen3_5_moe", "nemotron_h")  # of the table of families


@dataclass(frozen=True)
class Checkpoint:
    """`model`: what was saved in `folder`. `donor`: a model that holds the MTP layer's blocks among
    its layers."""

    folder: Path
    model: Any
    donor: Any
    names: Names

    @property
    def mtp_tensors(self) -> dict[str, Tensor]:
        own = [*self.names.blocks, "mtp"]
        return {n: t for n, t in tensors_of(self.folder).items() if n.startswith(tuple(own))}


def saved_with_mtp(folder: Path, model_type: str, **overrides: Any) -> Checkpoint:
    """A tiny model, saved with an MTP layer under its family's names."""
    names = FAMILIES[model_type]
    model = saved(folder, model_type, **overrides)
    donor: Any = tiny_model(model_type, seed=7, **overrides)
    with TemporaryDirectory() as other:
        donor.save_pretrained(other)
        given = tensors_of(Path(other))
    extra: dict[str, Tensor] = {}
    for block, number in names.blocks.items():
        for name, tensor in given.items():
            place = re.fullmatch(rf".*\.layers\.{number}\.(.*)", name)
            if place:
                extra[f"{block}.{place[1]}"] = tensor
    size = donor.get_decoder().config.hidden_size
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


def computed_by_hand(made: Checkpoint, input_ids: Tensor) -> tuple[Tensor, Truth]:
    """[1,L] -> [1,L-1,H] in fp64: the MTP layer's output for every token that has a next one; and
    the truth of its experts."""
    model, donor = (copy.deepcopy(each).double() for each in (made.model, made.donor))
    for each in (model, donor):
        each.set_experts_implementation("eager")
        each.set_attn_implementation("eager")
    stack = donor.get_decoder()
    hidden = model.get_decoder()(input_ids=input_ids, use_cache=False)[0]
    tensors = {name: x.double() for name, x in made.mtp_tensors.items()}
    last: Any = getattr(stack, "norm_f", None) or stack.norm
    eps = float(getattr(last, "variance_epsilon", None) or last.eps)

    def norm(name: str, x: Tensor) -> Tensor:
        weight = tensors[f"{name}.weight"] + (1 if made.names.one_plus else 0)
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight

    embedded = model.get_input_embeddings()(input_ids)
    halves = (
        norm(made.names.embedding_norm, embedded[:, 1:]),
        norm(made.names.hidden_norm, hidden[:, :-1]),
    )
    x = torch.cat(halves, -1) @ tensors[f"{made.names.projection}.weight"].T
    positions = torch.arange(x.shape[1])[None]
    later = torch.full((x.shape[1], x.shape[1]), -1e30, dtype=x.dtype).triu(1)
    given: dict[str, Any] = {"attention_mask": later[None, None], "position_ids": positions}
    kinds: Any = getattr(stack.config, "layer_types", None)
    with brute_force(donor) as truths, torch.no_grad():
        for number in made.names.blocks.values():
            if hasattr(stack, "rotary_emb"):
                by_kind = made.donor.config.model_type == "mellum"
                kind = {"layer_type": kinds[number]} if by_kind else {}
                given["position_embeddings"] = stack.rotary_emb(x, positions, **kind)
            x = stack.layers[number](x, **given)
            x = x[0] if isinstance(x, tuple) else x
    (truth,) = truths.values()
    return norm(made.names.final_norm, x).detach(), truth
