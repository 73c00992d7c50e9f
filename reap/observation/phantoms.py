"""Slots that a router fills without choosing an expert.

Statistics count every slot with an id of an expert, since a gate that is rounded to zero was chosen
all the same. An architecture that writes "no expert" as an expert with a gate of zero has a row
here: which slots it meant is worked out from what its router returned. (LongCat's zero experts and
the sentinel of expert parallelism have ids of their own, beyond those of the experts.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

Mark = Callable[[Tensor], Tensor]  # ids [T,K] -> ids, those of phantoms replaced


def _skipped(router: Any, output: tuple[Tensor, ...]) -> Tensor:
    """ZAYA: one class beyond the experts skips them all, and comes out as expert 0 with gate 0."""
    choice = output[0].softmax(-1).float() + router.balancing_biases  # [T,E+1]
    return choice.topk(router.top_k, dim=-1).indices == router.num_experts


# Class of a router -> which slots of a call are phantoms [T,K] bool, from it and what it returned.
PHANTOMS: dict[str, Callable[[Any, tuple[Tensor, ...]], Tensor]] = {"ZayaRouter": _skipped}


def watch(router: nn.Module | None, experts: int, undo: ExitStack) -> Mark:
    """Follow a router until `undo`. What is returned gives the phantoms of its last call in this
    thread the id `experts`, which is no expert's."""
    told = PHANTOMS.get(type(router).__name__)
    if router is None or told is None:
        return lambda ids: ids
    now = threading.local()

    @torch.no_grad()
    def after(_: nn.Module, args: Any, output: tuple[Tensor, ...]) -> None:
        now.phantoms = told(router, output)

    def mark(ids: Tensor) -> Tensor:
        phantoms, now.phantoms = getattr(now, "phantoms", None), None
        if phantoms is None or phantoms.shape != ids.shape:  # called without the router
            return ids
        return ids.masked_fill(phantoms, experts)

    undo.callback(router.register_forward_hook(after).remove)
    return mark
