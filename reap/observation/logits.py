"""What a router computed before it chose: a logit per expert and token.

transformers' routers return them first. Those that do not have a row here. The numbers are the
model's own; where they are not to be had, or where what comes first is a softmax or a sigmoid of
them, they are unknown, and the log says so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from reap.model.experts import Experts, router_of
from reap.observation.layers import Layer

# Class of a router -> the child whose output they are.
CHILD = {"Gemma4TextRouter": "proj", "DiffusionGemmaTextRouter": "proj"}
# Class of a router -> where in what it returns they are.
PLACE = {"Llama4Router": 1}
# Routers with columns behind those of the experts, which stand for no expert, or for none that
# computes anything.
LONGER = ("ZayaRouter", "LongcatFlashTopkRouter")
FEW = 64  # values below this number may lie between 0 and 1 by chance


def watch_logits(layer: Layer, undo: ExitStack) -> Callable[[int], Tensor | None]:
    """Follow the router of a layer until `undo`. What is returned gives the logits [T,E] of its
    last call in this thread, if that was of so many tokens, and None where they are unknown."""
    found = _source(layer.experts)
    if found is None:
        _say(layer, "no router of its own is known")
        return lambda tokens: None
    source, cls = found
    now = threading.local()

    @torch.no_grad()
    def after(_: nn.Module, args: Any, output: Any) -> None:
        now.logits = _logits(cls, output, layer.info.num_experts)

    def taken(tokens: int) -> Tensor | None:
        logits, now.logits = getattr(now, "logits", None), None
        if logits is None or len(logits) != tokens:
            _say(layer, "it did not return them for the tokens that its experts got")
            return None
        reason = layer.observer.verdict(("logits", cls), lambda: _why_not(logits))
        if reason is not None:
            _say(layer, reason)
            return None
        return logits

    undo.callback(source.register_forward_hook(after).remove)
    return taken


def _source(experts: Experts) -> tuple[nn.Module, str] | None:
    """The module whose output has them, and the class of the router."""
    router = router_of(experts.block)
    if router is None:  # a linear layer, or none
        gates = (getattr(experts.block, name, None) for name in ("gate", "router"))
        router = next((gate for gate in gates if type(gate) is nn.Linear), None)
    if router is None:
        return None
    cls = type(router).__name__
    return (getattr(router, CHILD[cls]) if cls in CHILD else router), cls


def _logits(cls: str, output: Any, experts: int) -> Tensor | None:
    """[T,E] of what a source returned."""
    if isinstance(output, tuple):
        place = PLACE.get(cls, 0)
        output = output[place] if len(output) > place else None
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() < 2:
        return None
    rows = output.flatten(0, -2)
    if cls in LONGER:
        rows = rows[:, :experts]
    return rows if rows.shape[1] == experts else None


def _why_not(logits: Tensor) -> str | None:
    """Why these cannot be logits. Waits for the device, once per kind of router."""
    inside = bool(((logits >= 0) & (logits <= 1)).all()) and bool((logits != logits[:1, :1]).any())
    shares = bool(((logits.double().sum(1) - 1).abs() < 0.02).all())
    if inside and (shares or logits.numel() >= FEW):
        return "what it returns lies between 0 and 1, as probabilities do"
    return None


def _say(layer: Layer, reason: str) -> None:
    layer.observer.say_once(
        f"logits of the router of {type(layer.experts.block).__name__} are not recorded: {reason}"
    )
