"""What identifies a model: read off its modules and configuration, or off its folder alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reap.errors import ReapError, first_line
from reap.model import compat
from reap.model.config import check_has_experts, config_for, model_classes, read_config, text_config
from reap.model.experts import Experts, find_experts, layer_info, pretrained
from reap.model.info import ModelInfo

# Fields of a configuration that say how a model is run or labelled, not what it is.
NOT_STRUCTURE = re.compile(
    r"_.*|.*dtype|transformers_version|architectures|use_cache|output_.*|return_dict.*|.*_token_id"
    r"|id2label|label2id|problem_type|quantization_config|initializer_range|.*dropout|auto_map"
    r"|chunk_size_feed_forward|name_or_path|tie_word_embeddings|is_encoder_decoder|model_type"
    r"|num_logits_to_keep|use_.*kernels?|.*_loss_coef|.*_aux_.*"
)
SAMPLES, SAMPLE_BYTES = 16, 4096  # of each weight file


def describe(model: nn.Module, experts: list[Experts] | None = None) -> ModelInfo:
    """What identifies `model`, and its MoE layers. Reads no weight, save of files it came from.

    `experts` are those that `find_experts` found in it, if that is known.

    `weights` is known when the model was loaded from a local folder that is still there.
    ReapError for a model without MoE layers, and for one with experts that cannot be observed.
    """
    inner = pretrained(model)
    found = {one.name: one for one in reversed(experts or find_experts(model))}
    config, folder = inner.config, compat.source(inner.config)
    layers = tuple(layer_info(one, config) for one in reversed(found.values()))
    local = bool(folder) and os.path.isdir(folder)
    return ModelInfo(
        model_type=config.model_type,
        name=(os.path.basename(os.path.realpath(folder)) if local else folder)
        or type(inner).__name__,
        fingerprint=fingerprint(config),
        weights=weights_fingerprint(Path(folder)) if local else None,
        layers=layers,
    )


def describe_folder(path: str | os.PathLike[str], like: ModelInfo | None = None) -> ModelInfo:
    """The same as `describe` of the model loaded from `path`, from its files alone.

    The model is built without memory for its weights, so this costs a second or so at any size. A
    composite model can be loaded whole or as its language model alone, which changes the names of
    its layers: with `like`, the folder is described in the way that matches it, if one does.
    ReapError when the folder is not a model's, or the model has no MoE layers that can be observed.
    """
    folder = Path(path)
    config = read_config(folder)
    check_has_experts(config, str(folder))
    described = []
    for cls in model_classes(config, folder):
        try:
            with torch.device("meta"):
                model = cls(config_for(cls, config))
        except Exception as error:
            raise ReapError(f"{folder}/config.json builds no model: {first_line(error)}") from error
        compat.set_source(model.config, folder)
        described.append(describe(model))
        if like is None or described[-1].difference(like) is None:
            return described[-1]
    return described[0]


def fingerprint(config: Any) -> str:
    """Hex SHA-256 of the structural part of the language model's configuration.

    The same for a model and its folder, whatever dtype, attention or experts implementation it runs
    with, and whether a composite model was loaded whole or as its language model alone.
    """
    structure = _structure(text_config(config).to_dict())
    text = json.dumps(structure, sort_keys=True, default=str, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _structure(fields: Any) -> Any:
    if isinstance(fields, Mapping):
        kept = {str(k): v for k, v in fields.items() if not NOT_STRUCTURE.fullmatch(str(k))}
        return {name: _structure(value) for name, value in kept.items() if value is not None}
    if isinstance(fields, list | tuple):
        return [_structure(value) for value in fields]
    return fields


def weights_fingerprint(folder: Path) -> str | None:
    """Hex SHA-256 over names, sizes, headers and samples of the data of the folder's weight files.

    Reads at most 64 KiB of each file's data; None when it has no safetensors files.
    """
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            length = min(int.from_bytes(file.read(8), "little"), size)
            stop = min(8 + length, size)
            digest.update(file.read(max(0, min(stop - 8, 1 << 27))))
            for i in range(SAMPLES):
                file.seek(stop + (size - stop) * i // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
