"""A model without its auxiliary loss of balanced experts, while its routers are cut.

A model that returns router logits adds that loss to its own, and takes the number of experts for it
from its configuration: the logits of cut routers have fewer columns than that, and perhaps other
numbers of them in every layer.
"""

from __future__ import annotations

import inspect
import logging
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from reap.errors import ReapError
from reap.model.config import text_config

log = logging.getLogger("reap")
FLAG = "output_router_logits"


class Unbalanced:
    """`model`, for a time without it: where the configuration asks for router logits, none are
    returned, of which a warning speaks once. ReapError for a call that asks for them itself; the
    model's base model, which has no loss, still returns them."""

    def __init__(self, model: nn.Module) -> None:
        configured = [module for module in model.modules() if hasattr(module, "config")]
        self._heads = [module for module in configured if _has_loss(type(module))]
        self._told = False

    def enter(self, undo: ExitStack) -> None:
        """From now on, until `undo`."""
        for head in self._heads:
            hook = head.register_forward_pre_hook(self._before, with_kwargs=True)
            undo.callback(hook.remove)

    @torch.compiler.disable
    def _before(self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get(FLAG):
            raise ReapError(
                f"{FLAG} adds an auxiliary loss, which {type(head).__name__} does not have while "
                "it is masked: leave it out, or ask its base_model for router logits"
            )
        configs = head.config, text_config(head.config)
        if not any(getattr(config, FLAG, False) for config in configs):
            return args, kwargs
        if not self._told:
            self._told = True
            log.warning(
                "%s of the configuration is off while the model is masked: it adds an auxiliary "
                "loss, which counts all experts",
                FLAG,
            )
        return args, {**kwargs, FLAG: False}


def _has_loss(cls: type[nn.Module]) -> bool:
    """Whether it computes losses and knows of router logits."""
    return {FLAG, "labels"} <= inspect.signature(cls.forward).parameters.keys()
