"""How alike experts are to their router: cosines between their rows, read off a model's files."""

from __future__ import annotations

import os
import re

import torch
from safetensors import safe_open
from torch import Tensor

from reap.checkpoint.blocks import Block, find_blocks, resolve
from reap.checkpoint.guards import described
from reap.checkpoint.operation import own_tensors
from reap.checkpoint.removal import MODALITIES
from reap.checkpoint.surgery import ROUTER, ends_of
from reap.errors import ReapError
from reap.files.folder import Folder, open_folder
from reap.files.paths import path_of
from reap.files.safefile import Header
from reap.files.safefile import Tensor as Entry
from reap.merging.averaging import WIDE
from reap.model.identity import describe_folder
from reap.model.info import LayerInfo, ModelInfo
from reap.model.stored import DTYPES

Stored = dict[str, tuple[Header, Entry]]


def router_similarity(
    model_dir: str | os.PathLike[str], model: ModelInfo | None = None
) -> dict[str, Tensor]:
    """Layer -> cosine between the router's rows of two experts, [E,E] fp64; a row of zeros is like
    none. For `make_merge(stats, "m-smoe", similarity=...)`.

    Layers are called as in `model` (of the statistics), or as the folder has them. Biases are left
    out: they shift an expert's logit by the same for every token. ReapError when the folder is not
    `model`, or a router has no matrix with a row per expert that can be read.
    """
    path_of(model_dir, "model_dir", "the folder of a model")
    folder = open_folder(model_dir)
    if model is None:
        model = describe_folder(folder.path)
    else:
        different = model.difference(described(folder, model), to_prune=True)
        if different:
            raise ReapError(f"{folder.path} is another model than the statistics': {different}")
    stored = {n: (shard, t) for shard in folder.shards for n, t in own_tensors(folder, shard)}
    blocks = find_blocks(stored)
    return {
        layer.name: _cosines(_rows(layer, resolve(layer.name, blocks), stored, folder))
        for layer in model.layers
    }


def _rows(layer: LayerInfo, block: Block, stored: Stored, folder: Folder) -> Tensor:
    """The router's matrix of a layer [E, inputs], rows beyond its experts left out."""
    for modalities in MODALITIES:
        if f"{block.module}.{modalities.each[-1].router}" in stored:
            one = modalities.each[modalities.index(layer.name)]
            weight = _read(f"{block.module}.{one.router}", stored)
            return (weight if one.axis == 0 else weight.T)[: layer.num_experts]
    for name, (_, entry) in stored.items():
        if not name.startswith(f"{block.layer}.") or len(entry.shape) != 2:
            continue
        axis = next(
            (a for pattern, a in ROUTER for t in ends_of(name, block) if re.fullmatch(pattern, t)),
            None,
        )
        if axis == 0 and entry.shape[0] >= layer.num_experts:
            return _read(name, stored)[: layer.num_experts]
    raise ReapError(
        f"{folder.path}: the router of {layer.name} has no matrix with a row for each of "
        f"{layer.num_experts} experts: give another similarity"
    )


def _read(name: str, stored: Stored) -> Tensor:
    shard, entry = stored[name]
    if DTYPES.get(entry.dtype) not in WIDE:
        raise ReapError(f"{name!r} is of {entry.dtype}: rows of a quantised router are not read")
    with safe_open(shard.path, framework="pt") as file:
        return file.get_tensor(name).double()


def _cosines(rows: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    unit = rows / torch.where(norms == 0, 1, norms)
    return unit @ unit.T
