"""A multi-token-prediction layer follows the model: it runs on what every forward computed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from reap.errors import ReapError
from reap.model.mtplayer import Mtp, stack_of
from reap.statistics.stats import Statistics


def follow(model: nn.Module, mtp: Mtp, stats: Statistics, undo: ExitStack) -> None:
    """Run `mtp` after every forward of `model`, until `undo`.

    A token is counted when it and the next one are no padding, and it is of those that
    `stats.counting` lets count. ReapError, in a forward, for a call that continues a cache, of
    which the layer has none, and for a mask that is not [batch, length].
    """
    stack = stack_of(model)
    if type(mtp.stack) is not type(stack) or mtp.width != stack.config.hidden_size:
        raise ReapError(
            f"mtp is of another model than this {type(stack).__name__}: give what "
            "reap.load_mtp(model) gives"
        )
    embedding: Any = stack.get_input_embeddings()
    names = list(inspect.signature(type(stack).forward).parameters)[1:]

    @torch.compiler.disable
    @torch.no_grad()
    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        hidden = output[0]  # [B,L,H], of a tuple and of an output with names
        _check_whole(given, hidden.shape[1])
        if hidden.shape[1] < 2:
            return
        embedded = given.get("inputs_embeds")
        if embedded is None:
            embedded = embedding(given["input_ids"][:, 1:])
        else:
            embedded = embedded[:, 1:]
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        counted = stats.counted
        if counted is not None:
            counted = counted.reshape(hidden.shape[:2])[:, :-1]
        with stats.counting(counted):
            mtp(
                hidden[:, :-1],
                embedded,
                attention_mask=None if mask is None else mask[:, :-1] * mask[:, 1:],
                position_ids=None if positions is None else positions[..., :-1],
            )

    undo.callback(stack.register_forward_hook(after, with_kwargs=True).remove)


def _check_whole(given: Mapping[str, Any], length: int) -> None:
    caches = [x for x in given.values() if callable(getattr(x, "get_seq_length", None))]
    if any(int(cache.get_seq_length()) > length for cache in caches):  # with these tokens by now
        raise ReapError(
            "a multi-token-prediction layer is observed on whole texts, and this call continues "
            "one: call the model without a cache (`generate`: use_cache=False), or without mtp"
        )
    mask = given.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise ReapError(
            "a multi-token-prediction layer needs an attention_mask [batch, length], 1 for a token "
            "and 0 for padding: this call has another, or a prepared one"
        )
