"""A model whose layers have different numbers of experts, of the classes of transformers.

Its MoE blocks are those of models that have the block's number everywhere, made by the same class:
so what depends on the number, in whatever way, is as the architecture has it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from reap.errors import ReapError
from reap.model import compat
from reap.model.config import EXPERT_COUNT_KEYS, model_classes, text_config
from reap.model.experts import Experts, find_experts, layer_info
from reap.model.uneven import counts_of


def classes_for(config: Any, folder: Path) -> list[Any]:
    """`model_classes`, of classes that build the layers as the configuration counts them."""
    counts = counts_of(config)
    return [uneven_class(cls, counts) for cls in model_classes(config, folder)]


def uneven_class(cls: Any, counts: tuple[int, ...]) -> Any:
    """A class like `cls` whose MoE layers have `counts` experts; `cls` itself without any."""
    if not counts:
        return cls

    class Uneven(cls):
        def __init__(self, config: Any, *args: Any, **options: Any) -> None:
            super().__init__(config, *args, **options)
            _exchange(self, cls, config, counts)

    Uneven.__name__, Uneven.__qualname__ = cls.__name__, cls.__qualname__
    Uneven.__module__ = cls.__module__
    return Uneven


def _exchange(model: Any, cls: Any, config: Any, counts: tuple[int, ...]) -> None:
    """Give every layer of `model`, which has the largest number everywhere, its own."""
    names = list(dict.fromkeys(name for name, _ in _named(model)))
    if len(names) != len(counts):
        raise ReapError(
            f"config.json counts the experts of {len(counts)} layers, {cls.__name__} has "
            f"{len(names)} MoE layers"
        )
    wanted = dict(zip(names, counts, strict=True))
    for count in sorted({*counts} - {max(counts)}):
        donor = cls(_with_count(config, max(counts), count))
        for name, experts in _named(donor):
            if wanted[name] != count:
                continue
            if layer_info(experts, donor.config).num_experts != count:
                raise ReapError(
                    f"{cls.__name__} takes the number of experts from elsewhere than its "
                    "configuration: its layers cannot have different numbers"
                )
            (place,) = (path for path, part in donor.named_modules() if part is experts.block)
            parent, _, leaf = place.rpartition(".")
            setattr(model.get_submodule(parent), leaf, experts.block)


def _named(model: Any) -> list[tuple[str, Experts]]:
    """The experts, tied layers by one name: while transformers loads a model, it ties nothing yet,
    so that they do not show it."""
    found, ties = [], compat.ties(model)
    for experts in find_experts(model):
        weights = (ties.get(f"{experts.name}.{n}") for n, _ in experts.module.named_parameters())
        first = next(filter(None, weights), None)
        found.append((first.rpartition(".")[0] if first else experts.name, experts))
    return found


def _with_count(config: Any, most: int, count: int) -> Any:
    new = copy.deepcopy(config)
    text = text_config(new)
    for place in filter(None, (text, getattr(text, "ffn_config", None))):
        for key in EXPERT_COUNT_KEYS:
            if getattr(place, key, None) == most:
                setattr(place, key, count)
    return new
