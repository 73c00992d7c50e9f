"""Launches that are repeated with other tensors, without what triton does to find the kernel.

For each launch triton binds some thirty arguments by name, looks at each, and makes a key of them
all: most of what a launch costs the host. What it would find is known once a call of the same
signature was launched: the compiled kernel, the grid and every number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

MAX_PLANS = 256  # at a time: calls may have any number of tokens


class Step(NamedTuple):
    launch: Callable[..., None]
    arguments: list[Any]  # in the kernel's order
    places: list[tuple[int, int]]  # argument -> tensor that takes its place


class Recorder:
    """Launches kernels and records how. `given` are the tensors that the next call brings; every
    other one is a buffer, contiguous and made anew in the next call."""

    def __init__(self, given: Sequence[Tensor | None]) -> None:
        self._tensors = list(given)  # alive, so that no two have one id
        self._index = {id(tensor): i for i, tensor in enumerate(given) if tensor is not None}
        # A tensor in two places would not tell which of them a kernel was given.
        self._repeatable = len(self._index) == sum(tensor is not None for tensor in given)
        self._buffers: list[tuple[torch.Size, torch.dtype]] = []
        self._zeroed: list[int] = []
        self._steps: list[Step] = []

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        like = next(tensor for tensor in self._tensors if tensor is not None)
        buffer = like.new_empty(shape, dtype=dtype)
        self._index[id(buffer)] = len(self._tensors)
        self._tensors.append(buffer)
        self._buffers.append((buffer.shape, dtype))
        return buffer

    def zero(self, buffer: Tensor) -> None:
        """Before the first launch that takes it."""
        self._zeroed.append(self._index[id(buffer)])
        buffer.zero_()

    def launch(
        self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], **options: Any
    ) -> None:
        compiled = kernel[grid](**arguments, **options)
        if not isinstance(compiled, CompiledKernel):  # by the interpreter
            self._repeatable = False
            return
        ordered = [arguments[name] for name in kernel.arg_names]
        tensors = [i for i, value in enumerate(ordered) if isinstance(value, Tensor)]
        places = [(i, self._index[id(ordered[i])]) for i in tensors]
        for i in tensors:
            ordered[i] = None
        self._steps.append(Step(compiled[(*grid, 1, 1)[:3]], ordered, places))

    def plan(self) -> Plan | None:
        """What was launched; None if it cannot be repeated."""
        if not self._repeatable:
            return None
        return Plan(self._steps, self._buffers, self._zeroed)


class Plan(NamedTuple):
    steps: list[Step]
    buffers: list[tuple[torch.Size, torch.dtype]]
    zeroed: list[int]

    def run(self, given: Sequence[Any]) -> list[Tensor]:
        """Launches everything again; the buffers, in the order in which they were asked for."""
        like = next(tensor for tensor in given if tensor is not None)
        made = [like.new_empty(shape, dtype=dtype) for shape, dtype in self.buffers]
        tensors = (*given, *made)
        for number in self.zeroed:
            tensors[number].zero_()
        for launch, arguments, places in self.steps:
            filled = arguments.copy()
            for place, number in places:
                filled[place] = tensors[number]
            launch(*filled)
        return made


class Plans:
    """Plans by the signature of their calls; all are forgotten when there are too many."""

    def __init__(self) -> None:
        self._plans: dict[Any, tuple[Any, Plan]] = {}

    def get(self, key: Any, choice: Any) -> Plan | None:
        """The plan that was made with this very `choice`."""
        found = self._plans.get(key)
        return found[1] if found is not None and found[0] is choice else None

    def put(self, key: Any, choice: Any, plan: Plan | None) -> None:
        if plan is None:
            return
        if len(self._plans) >= MAX_PLANS:
            self._plans.clear()
        self._plans[key] = choice, plan
