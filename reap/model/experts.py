"""What differs between architectures, as tables; and what a model is, read off its modules.

A layer of mixture-of-experts (MoE) is found by structure: a module on transformers' experts
interface, or one with the same arguments, or one of two older shapes (see `Experts`). A module that
looks like experts and is none of these is an error, never skipped.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import nn

from reap.errors import ReapError
from reap.model import compat
from reap.model.config import TOP_K_KEYS, check_has_experts, text_config
from reap.model.info import LayerInfo

# What modules call the number of their experts, and of those that a token gets.
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
    modules = dict(inner.named_modules())
    for name, module in modules.items():
        kind = _kind(name, module)
        if kind is not None and not OTHER_TOWERS.search(name):
            block = modules[name.rpartition(".")[0]]
            weights = tuple(id(parameter) for parameter in module.parameters())
            first = names.setdefault(weights or (id(module),), name)
            found[name] = Experts(first, module, block, kind)
    _check_all_found(inner, modules, set(found))
    return list(found.values())


def _kind(name: str, module: nn.Module) -> str | None:
    if name[-1:].isdigit() and name.rpartition(".")[2].isdigit():  # one expert of a list
        return None
    if compat.dispatches(module):
        return "interface"
    parameters = _parameters(type(module).forward)
    if len(parameters) >= 3 and _count(module) and _is_direct(parameters):
        return "direct"
    if parameters == ("hidden_states",) and type(module).__name__ == "Llama4TextExperts":
        return "input_scaled"
    listed = isinstance(module, nn.ModuleList) and len(module) > 1
    return "list" if listed and NAMED_EXPERTS.search(name) else None


@lru_cache(maxsize=1024)  # a model has thousands of modules of a few classes
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a method's parameters, without self."""
    return tuple(inspect.signature(forward).parameters)[1:]


def _is_direct(parameters: tuple[str, ...]) -> bool:
    ids, gates = parameters[1:3]
    return bool(re.search(r"ind|idx|ids|selected_experts", ids)) and "weight" in gates


def router_of(block: nn.Module) -> nn.Module | None:
    """The child of a MoE block that routes, if it is more than a linear layer."""
    for name in ("gate", "router"):
        router = getattr(block, name, None)
        if isinstance(router, nn.Module) and type(router) is not nn.Linear:
            return router
    return None


def _check_all_found(model: nn.Module, modules: dict[str, nn.Module], names: set[str]) -> None:
    missed = []
    around = {parent for name in names for parent in _parents(name)}
    for name, module in modules.items():
        looks = _looks_like_experts(type(module).__name__) or NAMED_EXPERTS.search(name)
        if not looks or not name or OTHER_TOWERS.search(name) or "shared_expert" in name:
            continue
        related = name in names or name in around or any(p in names for p in _parents(name))
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
        check_has_experts(model.config, type(model).__name__)
        raise ReapError(
            f"{type(model).__name__}: the config counts experts, but no module holds any"
        )


@lru_cache(maxsize=1024)
def _looks_like_experts(cls: str) -> bool:
    return LOOKS_LIKE_EXPERTS.search(cls) is not None


def _parents(name: str) -> Iterator[str]:
    """ "a.b.c" -> "a.b", "a" """
    while name := name.rpartition(".")[0]:
        yield name


def layer_info(experts: Experts, config: Any) -> LayerInfo:
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
    said = (getattr(module, name, None) for module in modules for name in TOP_K_ATTRIBUTES)
    configs = (*(getattr(module, "config", None) for module in modules), config)
    written = (getattr(place, key, None) for place in configs for key in TOP_K_KEYS)
    numbers = (n for n in chain(said, written) if isinstance(n, int) and not isinstance(n, bool))
    return next(numbers, None)


def _groups(experts: Experts) -> tuple[int, int, int]:
    """Router groups, how many of them a token may use, and how many experts score one."""
    for module in _routing_modules(experts):
        best = getattr(module, "topk_group", None)
        for name in GROUP_ATTRIBUTES if best is not None else ():
            groups = getattr(module, name, None)
            if isinstance(groups, int) and isinstance(best, int) and groups > 1:
                method = getattr(module, "topk_method", None)
                least = GROUP_SCORES.get(str(method), DEFAULT_GROUP_SCORE)
                return (groups, best, least) if least else (1, 1, 1)
    return 1, 1, 1
