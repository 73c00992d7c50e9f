"""What differs between architectures, as tables; and what a model is, read off its modules.

A layer of mixture-of-experts (MoE) is found by structure: a module on transformers' experts
interface, or one with the same arguments, or one of two older shapes (see `Experts`). A module that
looks like experts and is none of these is an error, never skipped.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reap.errors import ReapError, first_line
from reap.info import LayerInfo, ModelInfo

# Configuration keys, most specific first; a composite model has them in its `text_config`.
EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = (
    *("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k"),
    "moe_top_k",
)
# What modules call the same things.
COUNT_ATTRIBUTES = ("num_routed_experts", "num_experts", "num_local_experts")
TOP_K_ATTRIBUTES = ("top_k", "topk", "num_experts_per_tok", "k")
GROUP_ATTRIBUTES = ("num_group", "n_group")
# `topk_method` of a router with groups -> how many experts score a group; 0: groups are not used.
GROUP_SCORES = {"greedy": 0, "group_limited_greedy": 1}
DEFAULT_GROUP_SCORE = 2  # the sum of the two best (DeepSeek-V3 and all that followed)

# Towers whose tokens are not text: their experts see no calibration text and are left alone.
OTHER_TOWERS = re.compile(r"(^|\.)(vision|visual|image|audio|talker|code2wav)\w*(\.|$)")
# Routed experts, and classes that hold them, go by these names.
NAMED_EXPERTS = re.compile(r"(^|\.)(?!\w*shared)\w*experts$")
LOOKS_LIKE_EXPERTS = re.compile(r"(Experts|MoE|MOE|Moe|SparseMLP|MoeBlock|MoEBlock)$")
# Fields of a configuration that say how a model is run or labelled, not what it is.
NOT_STRUCTURE = re.compile(
    r"_.*|.*dtype|transformers_version|architectures|use_cache|output_.*|return_dict.*|.*_token_id"
    r"|id2label|label2id|problem_type|quantization_config|initializer_range|.*dropout|auto_map"
    r"|chunk_size_feed_forward|name_or_path|tie_word_embeddings|is_encoder_decoder|model_type"
    r"|num_logits_to_keep|use_.*kernels?|.*_loss_coef|.*_aux_.*"
)
SAMPLES, SAMPLE_BYTES = 16, 4096  # of each weight file


@dataclass(frozen=True)
class Experts:
    """The experts of one layer: `module`, in the module `block`.

    `name` is the module's own, or that of the first module with the same weights where some are
    tied: such experts are one set and share their statistics.

    kind: "interface" (transformers' experts interface), "direct" (forward takes hidden states,
    expert ids and gates), "input_scaled" (Llama 4: the gate multiplies the experts' input) or
    "list" (a ModuleList of experts in a block that routes by itself).
    """

    name: str
    module: nn.Module
    block: nn.Module
    kind: str


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the language model."""
    get = getattr(config, "get_text_config", None)
    return get() if callable(get) else config


def num_experts_key(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The path of the key that holds the number of experts in a config.json; None without one."""
    for path, part in (((), config), (("text_config",), config.get("text_config") or {})):
        for key in EXPERT_COUNT_KEYS:
            if part.get(key):
                return (*path, key)
    return None


def describe(model: nn.Module) -> ModelInfo:
    """What identifies `model`, and its MoE layers. Reads no weight, save of files it came from.

    `weights` is known when the model was loaded from a local folder that is still there.
    ReapError for a model without MoE layers, and for one with experts that cannot be observed.
    """
    inner = pretrained(model)
    found = {experts.name: experts for experts in reversed(find_experts(model))}
    config, folder = inner.config, str(getattr(inner.config, "_name_or_path", "") or "")
    layers = tuple(_layer_info(experts, config) for experts in reversed(found.values()))
    local = bool(folder) and os.path.isdir(folder)
    return ModelInfo(
        model_type=config.model_type,
        name=(os.path.basename(os.path.realpath(folder)) if local else folder)
        or type(inner).__name__,
        fingerprint=fingerprint(config),
        weights=_weights_fingerprint(Path(folder)) if local else None,
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
    _check_has_experts(config, str(folder))
    described = []
    for cls in model_classes(config, folder):
        try:
            with torch.device("meta"):
                model = cls(_config_for(cls, config))
        except Exception as error:
            raise ReapError(f"{folder}/config.json builds no model: {first_line(error)}") from error
        model.config._name_or_path = str(folder)
        described.append(describe(model))
        if like is None or described[-1].difference(like) is None:
            return described[-1]
    return described[0]


def read_config(folder: Path) -> Any:
    """The configuration of the model in `folder`; ReapError when it has none that can be used."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ReapError(f"{folder} is not a model folder: it has no config.json")
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise ReapError(f"{folder}/config.json is not usable: {first_line(error)}") from error


def auto_classes() -> tuple[Any, ...]:
    """transformers' classes that load models of text, the more special one first."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForCausalLM, AutoModelForImageTextToText


def model_classes(config: Any, folder: Path) -> list[Any]:
    """The classes that may load this configuration, the one that loads text models first.

    ReapError, which names the folder it is from, when there is none.
    """
    import transformers

    mapped = [auto._model_mapping.get(type(config), None) for auto in auto_classes()]
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    classes = list(dict.fromkeys(cls for cls in (*mapped, *named) if isinstance(cls, type)))
    if not classes:
        raise ReapError(f"{folder}: transformers has no language model of type {config.model_type}")
    return classes


def _config_for(cls: Any, config: Any) -> Any:
    """A copy of the part of a composite configuration that `cls` is built from."""
    composite = isinstance(config, cls.config_class) or cls.config_class is None
    return copy.deepcopy(config if composite else text_config(config))


def pretrained(model: nn.Module) -> nn.Module:
    """The transformers model in `model`, which may be a wrapper (DDP, PEFT, torch.compile)."""
    from transformers import PreTrainedModel

    if isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                return module
    raise ReapError(f"the model is a {type(model).__name__}: it must be a transformers model")


def find_experts(model: nn.Module) -> list[Experts]:
    """The experts of every MoE layer of the language model, in the order of its modules.

    ReapError when there are none, and for modules that look like experts and cannot be observed.
    """
    inner = pretrained(model)
    found: dict[str, Experts] = {}
    names: dict[tuple[int, ...], str] = {}  # by the identity of the weights
    for name, module in inner.named_modules():
        if OTHER_TOWERS.search(name):
            continue
        block = inner.get_submodule(name.rpartition(".")[0])
        kind = _kind(name, module)
        if kind is not None:
            weights = tuple(id(parameter) for parameter in module.parameters())
            first = names.setdefault(weights or (id(module),), name)
            found[name] = Experts(first, module, block, kind)
    _check_all_found(inner, set(found))
    return list(found.values())


def _kind(name: str, module: nn.Module) -> str | None:
    if name.rpartition(".")[2].isdigit():  # one expert of a list
        return None
    if dispatches(module):
        return "interface"
    parameters = list(inspect.signature(type(module).forward).parameters)[1:]
    if len(parameters) >= 3 and _count(module) and _is_direct(parameters):
        return "direct"
    if parameters == ["hidden_states"] and type(module).__name__ == "Llama4TextExperts":
        return "input_scaled"
    listed = isinstance(module, nn.ModuleList) and len(module) > 1
    return "list" if listed and NAMED_EXPERTS.search(name) else None


def dispatches(module: nn.Module) -> bool:
    """Whether the module's class looks its forward up in transformers' experts interface."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    forward = type(module).forward
    names = getattr(getattr(forward, "__code__", None), "co_freevars", ())
    cells = dict(zip(names, forward.__closure__ or (), strict=False))
    interface = cells.get("experts_interface")
    return interface is not None and interface.cell_contents is ALL_EXPERTS_FUNCTIONS


def _is_direct(parameters: list[str]) -> bool:
    ids, gates = parameters[1:3]
    return bool(re.search(r"ind|idx|ids|selected_experts", ids)) and "weight" in gates


def router_of(block: nn.Module) -> nn.Module | None:
    """The child of a MoE block that routes, if it is more than a linear layer."""
    for name in ("gate", "router"):
        router = getattr(block, name, None)
        if isinstance(router, nn.Module) and type(router) is not nn.Linear:
            return router
    return None


def _check_all_found(model: nn.Module, names: set[str]) -> None:
    missed = []
    for name, module in model.named_modules():
        looks = LOOKS_LIKE_EXPERTS.search(type(module).__name__) or NAMED_EXPERTS.search(name)
        if not looks or not name or OTHER_TOWERS.search(name) or "shared_expert" in name:
            continue
        related = any(
            name == other or name.startswith(other + ".") or other.startswith(name + ".")
            for other in names
        )
        if not related and any(True for _ in module.parameters()):
            missed.append((name, type(module).__name__))
    if missed:
        name, cls = missed[0]
        raise ReapError(
            f"{cls} ({name}, {len(missed)} such modules) cannot be observed: it is not on "
            "transformers' experts interface and shows no expert ids and gates; a quantised model "
            "can be observed when it is loaded dequantised"
        )
    if not names:
        _check_has_experts(model.config, type(model).__name__)
        raise ReapError(
            f"{type(model).__name__}: the config counts experts, but no module holds any"
        )


def _check_has_experts(config: Any, name: str) -> None:
    """ReapError for a dense model."""
    text = text_config(config)
    if not any(_positive(getattr(text, key, None)) for key in EXPERT_COUNT_KEYS) and not any(
        _positive(getattr(getattr(text, "ffn_config", None), key, None))
        for key in EXPERT_COUNT_KEYS
    ):
        raise ReapError(
            f"{name} is a {config.model_type} model without mixture-of-experts layers: there is "
            "nothing to observe or prune"
        )


def _positive(count: Any) -> bool:
    """Of a number of experts, or one number per layer."""
    return max(count, default=0) > 0 if isinstance(count, list | tuple) else bool(count)


def _layer_info(experts: Experts, config: Any) -> LayerInfo:
    count = _count(experts.module) or _list_length(experts.module)
    top_k = _top_k(experts, text_config(config))
    if not count or not top_k:
        raise ReapError(
            f"{type(experts.module).__name__} ({experts.name}) cannot be observed: it does not say "
            f"{'how many experts it has' if not count else 'how many experts a token gets'}"
        )
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        weight = getattr(experts.module, name, None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 3 and weight.shape[0] < count:
            raise ReapError(
                f"layer {experts.name}: the config says {count} experts, {name} holds "
                f"{weight.shape[0]}"
            )
    groups, best, least = _groups(experts)
    return LayerInfo(experts.name, count, top_k, groups, best, least)


def _count(module: nn.Module) -> int | None:
    values = (getattr(module, name, None) for name in COUNT_ATTRIBUTES)
    return next((value for value in values if isinstance(value, int)), None)


def _list_length(module: nn.Module) -> int:
    return len(module) if isinstance(module, nn.ModuleList) else 0


def _routing_modules(experts: Experts) -> Iterator[nn.Module]:
    """Where an architecture may keep its routing parameters, most specific first."""
    children = dict(experts.block.named_children())
    yield from (child for name, child in children.items() if name in ("gate", "router"))
    yield experts.block
    yield experts.module


def _top_k(experts: Experts, config: Any) -> int | None:
    modules = list(_routing_modules(experts))
    configs = [*(getattr(module, "config", None) for module in modules), config]
    said = [getattr(module, name, None) for module in modules for name in TOP_K_ATTRIBUTES]
    said += [getattr(place, key, None) for place in configs for key in TOP_K_KEYS]
    numbers = (n for n in said if isinstance(n, int) and not isinstance(n, bool))
    return next(numbers, None)


def _groups(experts: Experts) -> tuple[int, int, int]:
    """Router groups, how many of them a token may use, and how many experts score one."""
    for module in _routing_modules(experts):
        for name in GROUP_ATTRIBUTES:
            groups, best = getattr(module, name, None), getattr(module, "topk_group", None)
            if isinstance(groups, int) and isinstance(best, int) and groups > 1:
                method = getattr(module, "topk_method", None)
                least = GROUP_SCORES.get(str(method), DEFAULT_GROUP_SCORE)
                return (groups, best, least) if least else (1, 1, 1)
    return 1, 1, 1


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


def _weights_fingerprint(folder: Path) -> str | None:
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
