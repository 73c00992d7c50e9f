"""What identifies a model: read off its modules and configuration, or off its folder alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reap import versions
from reap.errors import ReapError, first_line
from reap.files.folder import CONFIG
from reap.files.safefile import Header, read_header, read_json
from reap.model import compat
from reap.model.config import check_has_experts, config_for, read_config, text_config
from reap.model.experts import Experts, find_experts, layer_info, pretrained
from reap.model.info import LayerInfo, ModelInfo
from reap.model.mtp import UnsupportedMtpError, find_mtp
from reap.model.mtplayer import Mtp, mtp_on_meta
from reap.model.structure import NOT_STRUCTURE, Structure, as_written
from reap.model.unevenmodel import classes_for

ROUTER = re.compile(
    r"(.*\.)?(gate|router)(\.(gate|wg|layer|proj|linear|classifier))?\.weight|.*gate_weight"
)
LAYER = re.compile(r".*?\.\d+\.")  # the prefix of a decoder layer's tensors
SAMPLES, SAMPLE_BYTES = 16, 4096  # of each weight file


def describe(
    model: nn.Module, experts: list[Experts] | None = None, mtp: Mtp | None = None
) -> ModelInfo:
    """What identifies `model`, and its MoE layers. Reads no weight, save of files it came from.

    `experts` are those that `find_experts` found in it, if that is known; the layers of `mtp`, its
    multi-token-prediction layer, are described with it. A model that was loaded
    from a local folder is what the folder's files say, if it is still there; of another only its
    modules can tell, and its `weights` are unknown.
    ReapError for a model without MoE layers, and for one with experts that cannot be observed.
    """
    inner = pretrained(model)
    found = {one.name: one for one in reversed(experts or find_experts(model))}
    config, folder = inner.config, compat.source(inner.config)
    layers = tuple(layer_info(one, config) for one in reversed(found.values()))
    local = Path(folder) if folder and os.path.isdir(folder) else None
    return ModelInfo(
        model_type=config.model_type,
        name=(os.path.basename(os.path.realpath(folder)) if local else folder)
        or type(inner).__name__,
        fingerprint=fingerprint(config),
        weights=weights_fingerprint(local) if local else None,
        layers=(*layers, *(mtp.layers if mtp is not None else ())),
        structure=_structure_of(inner, list(found.values()), layers, local),
        transformers=versions.installed("transformers")["transformers"],
    )


def describe_folder(
    path: str | os.PathLike[str], like: ModelInfo | None = None, *, mtp: bool = False
) -> ModelInfo:
    """The same as `describe` of the model loaded from `path`, from its files alone.

    The model is built without memory for its weights, so this costs a second or so at any size. A
    composite model can be loaded whole or as its language model alone, which changes the names of
    its layers: with `like`, the folder is described in the way that matches it, if one does. `mtp`
    describes its multi-token-prediction layer too, where that is known how to run; `like` decides
    by itself.
    ReapError when the folder is not a model's, or the model has no MoE layers that can be observed.
    """
    folder = Path(path)
    config = read_config(folder)
    check_has_experts(config, str(folder))
    described = []
    for cls in classes_for(config, folder):
        try:
            with torch.device("meta"):
                model = cls(config_for(cls, config))
        except Exception as error:
            raise ReapError(f"{folder}/config.json builds no model: {first_line(error)}") from error
        compat.set_source(model.config, folder)
        plain = describe(model)
        if like is not None and plain.layers == like.layers:
            return plain
        extra = _mtp_layers(model, folder) if mtp or like is not None else ()
        whole = replace(plain, layers=(*plain.layers, *extra))
        if like is None or whole.layers == like.layers:
            return whole
        # Of layers that a release moved, their number tells which of the two is meant.
        described.append(whole if len(whole.layers) == len(like.layers) else plain)
    return described[0]


def _mtp_layers(model: nn.Module, folder: Path) -> tuple[LayerInfo, ...]:
    names = [name for header in _headers(folder) for name in header.tensors]
    try:
        mtp = mtp_on_meta(model, names)
    except UnsupportedMtpError:
        return ()
    return mtp.layers if mtp is not None else ()


def mtp_of(folder: Path, config: Any = None) -> tuple[str | None, str | None]:
    """The prefix of the folder's multi-token-prediction layer with experts, if it is known how to
    run it, else why it is not; both None without one. `config` is the folder's, if that is at hand.
    """
    names = [name for header in _headers(folder) for name in header.tensors]
    try:
        place = find_mtp(config or read_config(folder), names)
    except UnsupportedMtpError as error:
        return None, str(error)
    except ReapError:  # code that is not run, say: nothing is known of the layers at all
        return None, None
    return (place.root if place else None), None


def fingerprint(config: Any) -> str:
    """Hex SHA-256 of the structural part of the language model's configuration, defaults included.

    The same for a model and its folder, whatever dtype, attention or experts implementation it runs
    with, and whether a composite model was loaded whole or as its language model alone; another
    with a release of transformers that has other defaults.
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


def _structure_of(
    model: nn.Module, experts: list[Experts], layers: tuple[LayerInfo, ...], folder: Path | None
) -> Structure:
    modules = _counted(model, experts)
    if folder is None:
        return Structure(modules=modules)
    headers = _headers(folder)
    return Structure(
        config=_config_of(folder, model.config),
        tensors=_stored(headers),
        routers=_routers(headers, {layer.num_experts for layer in layers}),
        modules=modules,
    )


def _counted(model: nn.Module, experts: list[Experts]) -> dict[str, int]:
    """Sizes that every release counts alike, however it calls and fuses its modules."""
    found: dict[str, int] = {}
    try:
        embedding = model.get_input_embeddings().weight
        if embedding.dim() == 2 and 0 not in embedding.shape and _is_plain(embedding):
            found["vocab_size"], found["embedding_size"] = embedding.shape
    except (NotImplementedError, AttributeError):
        pass  # a model that does not say which they are
    last = experts[-1]
    stack = re.fullmatch(r"(.*)\.\d+\..*", last.name)
    layers = stack and model.get_submodule(stack[1])
    if isinstance(layers, nn.ModuleList):
        found["layers"] = len(layers)
    weights = list(last.module.parameters())
    if weights and all(map(_is_plain, weights)) and not compat.is_split(last.module):
        # Of all experts: a module list and a fused module hold the same number.
        found["parameters of a layer's experts"] = sum(weight.numel() for weight in weights)
    return found


def _is_plain(weight: torch.Tensor) -> bool:
    """Not packed by a quantiser, nor away on another rank."""
    return weight.is_floating_point() and weight.element_size() > 1 and weight.numel() > 0


def _config_of(folder: Path, config: Any) -> dict[str, Any]:
    """The language model's part of the folder's config.json, as it is written there."""
    try:
        written: Any = read_json(folder / CONFIG)
    except ReapError:
        return {}
    # The folder's configuration may be composite where the model is its language model alone.
    for name in _path_to_text(config, text_config(config)) or _path_in(
        written, text_config(config)
    ):
        written = written.get(name) if isinstance(written, Mapping) else None
    return as_written(written) if isinstance(written, Mapping) else {}


def _path_to_text(config: Any, text: Any) -> tuple[str, ...]:
    """The attributes that lead from a configuration to its language model's."""
    for name, value in vars(config).items():
        if value is text and not name.startswith("_"):
            return (name,)
        if hasattr(value, "get_text_config"):
            path = _path_to_text(value, text)
            if path:
                return (name, *path)
    return ()


def _path_in(written: Mapping[str, Any], text: Any, depth: int = 2) -> tuple[str, ...]:
    """The keys that lead to the part of the language model's type, where it is not the root."""
    if written.get("model_type") == text.model_type or not depth:
        return ()
    for name, value in written.items():
        if isinstance(value, Mapping):
            if value.get("model_type") == text.model_type:
                return (name,)
            path = _path_in(value, text, depth - 1)
            if path:
                return (name, *path)
    return ()


def _headers(folder: Path) -> list[Header]:
    """Of the folder's weight files; none when one of them is damaged."""
    try:
        return [read_header(path) for path in sorted(folder.glob("*.safetensors"))]
    except ReapError:
        return []


def _stored(headers: list[Header]) -> dict[str, tuple[str, ...]]:
    """Tensor names with * for numbers -> what is stored under them."""
    found: dict[str, set[str]] = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
            found.setdefault(pattern, set()).add(f"{tensor.dtype} {list(tensor.shape)}")
    return {pattern: tuple(sorted(found[pattern])) for pattern in sorted(found)}


def _routers(headers: list[Header], counts: set[int]) -> dict[str, tuple[str, ...]]:
    """Router -> its dtype and what its first bytes and those of the norms of its layer hash to."""
    norms: dict[str, list[tuple[str, bytes]]] = {}
    routers: dict[str, tuple[str, bytes]] = {}
    for header in headers:
        with header.path.open("rb") as file:
            for name, tensor in header.tensors.items():
                layer = LAYER.match(name)
                is_norm = "norm" in name and len(tensor.shape) == 1 and layer
                is_router = ROUTER.fullmatch(name) and counts & set(tensor.shape)
                if is_norm or is_router:
                    file.seek(header.data + tensor.start)
                    sample = file.read(min(SAMPLE_BYTES, tensor.nbytes))
                    if is_router:
                        routers[name] = tensor.dtype, sample
                    elif layer:
                        norms.setdefault(layer[0], []).append((name, sample))
    found: dict[str, tuple[str, ...]] = {}
    for name, (dtype, sample) in sorted(routers.items()):
        layer = LAYER.match(name)
        around = sorted(norms.get(layer[0], [])) if layer else []
        found[name] = dtype, _short_hash(sample), _short_hash(*(data for _, data in around))
    return found


def _short_hash(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


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
