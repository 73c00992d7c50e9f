"""Whether what was observed is what ran: every layer, from its first call to its last, and once.

A layer that another program replaces while it is observed (its module, its forward or that of its
block) runs without being counted. A program that calls the layers itself may run each more than
once. Both are seen by counting calls and tokens where they enter and where they are recorded.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reap.errors import ReapError
from reap.model import compat
from reap.observation.layers import Layer
from reap.observation.padding import naming, token_shape

log = logging.getLogger("reap")


@dataclass
class _Model:
    """A model that contains experts."""

    module: nn.Module
    tokens: float = 0  # that it was called with, padding included; infinite: that cannot be told
    returned: int = 0  # calls


@dataclass
class _Calls:
    """Of one layer."""

    model: _Model  # the innermost that contains it
    recorded: int = 0
    tokens: int = 0  # of the recorded calls, padding included
    entered: int = 0  # calls of its experts
    module: int = 0  # and those that returned, however they ran
    block: int = 0
    first: tuple[Tensor, Tensor] | None = None  # ids and gates of the first call
    repeats: Tensor | None = None  # how often they came again, beyond what the model was given


class Witness:
    """Counts the calls of observed layers and of the models that contain them."""

    def __init__(self) -> None:
        self._layers: dict[Layer, _Calls] = {}
        self._models: list[_Model] = []
        self._embeddings = _Model(nn.Identity())  # they run even where no model is called
        self._counting = threading.Lock()

    def install(self, layers: Iterable[Layer], models: list[nn.Module], undo: ExitStack) -> None:
        """Hooks that `undo` removes. `models` are those with experts, outermost first."""
        inside = []
        for module in models:
            model = _Model(module)
            self._models.append(model)
            inside.append((model, {id(part) for part in module.modules()}))
            enter = module.register_forward_pre_hook(self._entering(model), with_kwargs=True)
            undo.callback(enter.remove)
            undo.callback(module.register_forward_hook(self._counting_in(model, "returned")).remove)
        for part in models[0].modules() if models else ():
            if isinstance(part, nn.Embedding):
                hook = self._counting_in(self._embeddings, "returned")
                undo.callback(part.register_forward_hook(hook).remove)
        for layer in layers:
            experts = layer.experts
            holders = [model for model, parts in inside if id(experts.module) in parts]
            calls = self._layers[layer] = _Calls(holders[-1] if holders else _Model(experts.block))
            enter = experts.module.register_forward_pre_hook(self._counting_in(calls, "entered"))
            undo.callback(enter.remove)
            for field, part in (("module", experts.module), ("block", experts.block)):
                hook = self._counting_in(calls, field)
                undo.callback(part.register_forward_hook(hook).remove)

    def record(self, layer: Layer, ids: Tensor, gates: Tensor) -> None:
        """A call of `layer` goes into the statistics."""
        calls = self._layers[layer]
        calls.recorded += 1
        calls.tokens += len(ids)
        if calls.first is None:
            calls.first = ids.clone(), gates.clone()
        elif calls.tokens > calls.model.tokens and calls.first[0].shape == ids.shape:
            same = (calls.first[0] == ids).all() & (calls.first[1] == gates).all()
            # Stays on the device: no layer waits for it.
            calls.repeats = same.long() if calls.repeats is None else calls.repeats + same

    def check(self, model: nn.Module) -> None:
        """ReapError for a layer that ran without being counted; a warning for what may be right."""
        present = {id(module) for module in model.modules()}
        for layer, calls in self._layers.items():
            reason = _replaced(layer, calls, present)
            if reason is not None:
                raise ReapError(
                    f"{layer.cls} ({layer.info.name}) {reason} while it was observed, so that not "
                    "all of its calls were counted: change the model first (quantise, linearise, "
                    "wrap, choose an implementation) and observe it then"
                )
        ran = {layer.info.name: False for layer in self._layers}  # tied experts share a name
        for layer, calls in self._layers.items():
            ran[layer.info.name] |= calls.recorded > 0
        idle = [name for name, recorded in ran.items() if not recorded]
        # One that was entered and ended in an error, which the caller may have caught, was called.
        called = any(calls.entered for calls in self._layers.values())
        if len(idle) == len(ran) and self._ran() and not called:
            raise ReapError(
                f"the model ran and none of its {len(idle)} MoE layers did, such as {idle[0]}: "
                "something took their place: change the model first and observe it then"
            )
        if idle:
            log.warning("MoE layers never called: %d, such as %s", len(idle), idle[0])
        self._report_repeated()

    def _ran(self) -> bool:
        """Whether the model did, as a whole or, in a pipeline, in parts."""
        return any(part.returned for part in (self._embeddings, *self._models))

    def _report_repeated(self) -> None:
        remedy = "observe a run that calls every layer once to have exact totals"
        times = {layer.info.name: _times(calls) for layer, calls in self._layers.items()}
        repeated = [name for name, runs in times.items() if runs > 1]
        if repeated:
            log.warning(
                "%d MoE layers ran more than once on the same input, such as %s %d times, as in a "
                "pipeline that runs every layer to calibrate it and again to go on: counts and "
                "sums are too large by that, means are not: %s",
                *(len(repeated), repeated[0], times[repeated[0]], remedy),
            )
        for model in self._models:
            its = {layer: calls for layer, calls in self._layers.items() if calls.model is model}
            by_tokens: dict[int, str] = {}
            for layer, calls in its.items():
                by_tokens.setdefault(calls.tokens, layer.info.name)
            if len(by_tokens) > 1 and max(by_tokens) > model.tokens:
                ends = max(by_tokens), min(by_tokens)
                named = ", ".join(f"{by_tokens[tokens]} {tokens:,}" for tokens in ends)
                log.warning("MoE layers saw different numbers of tokens (%s): %s", named, remedy)

    def _entering(self, model: _Model) -> Callable[..., None]:
        named = naming(model.module)

        @torch.compiler.disable
        def entering(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            shape = token_shape(named(args, kwargs))
            with self._counting:
                model.tokens += math.inf if shape is None else math.prod(shape)

        return entering

    def _counting_in(self, counter: Any, field: str) -> Callable[..., None]:
        """A hook, before or behind a module, that counts its calls."""
        # A function, which copies of the model can have: they cannot have a lock.
        return lambda _, args, output=None: self._count(counter, field, output)

    @torch.compiler.disable
    def _count(self, counter: Any, field: str, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        empty = any(isinstance(x, Tensor) and not x.numel() for x in outputs)
        if not empty and not compat.in_backward():  # recomputed, and counted before
            with self._counting:
                setattr(counter, field, getattr(counter, field) + 1)


def _times(calls: _Calls) -> int:
    """How often the layer ran on each token, as far as that can be told."""
    repeats = 0 if calls.repeats is None else int(calls.repeats)
    if not repeats or not calls.model.tokens:
        return 1 + repeats
    times, rest = divmod(calls.tokens, calls.model.tokens)
    return 1 if rest else int(times)


def _replaced(layer: Layer, calls: _Calls, present: set[int]) -> str | None:
    """What became of an observed layer, None for nothing."""
    gone = id(layer.experts.module) not in present
    if gone or (id(layer.experts.block) not in present and not calls.recorded):
        return "was taken out of the model"
    if layer.replaced():
        return "lost some of its experts, or their forward,"
    ran = max(calls.module, calls.block)
    if ran > calls.recorded:
        what = "it" if calls.module == ran else "its block"
        return f"was replaced ({what} ran {ran} times, {calls.recorded} of them observed)"
    return None
