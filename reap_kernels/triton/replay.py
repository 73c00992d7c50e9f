"""Launches that are repeated with other tensors, without what triton does to find the kernel.

For each launch triton binds some thirty arguments by name, looks at each, and makes a key of them
all: most of what a launch costs the host. What it would find is known once a call of the same
signature was launched: the compiled kernel, the grid and every number. Tensors are handed over as
addresses: triton would ask each for its own, and the driver what memory it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

MAX_PLANS = 256  # at a time: calls may have any number of tokens
ALIGNMENT = 256  # of what is cut from the workspace [bytes]


class Step(NamedTuple):
    launch: Callable[..., None]
    arguments: list[Any]  # in the kernel's order
    places: list[tuple[int, int]]  # argument -> number of the tensor whose address takes its place


class Recorder:
    """Launches kernels and records how. `given` are the tensors that the next call brings; every
    other one is a buffer, contiguous and made anew in the next call."""

    def __init__(self, given: Sequence[Tensor | None]) -> None:
        self._given = list(given)  # alive, so that no two have one id
        self._results: list[Tensor] = []
        self._scratch: list[Tensor] = []
        # By id: whether it is given, a result or scratch, and its number there.
        self._index = {id(tensor): (0, i) for i, tensor in enumerate(given) if tensor is not None}
        # A tensor in two places would not tell which of them a kernel was given.
        self._repeatable = len(self._index) == sum(tensor is not None for tensor in given)
        self._steps: list[tuple[Callable[..., None], list[Any]]] = []

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A buffer that outlives the call."""
        return self._new(1, self._results, shape, dtype)

    def scratch(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A buffer of the call's own: later, a part of one workspace."""
        return self._new(2, self._scratch, shape, dtype)

    def _new(
        self, kind: int, kept: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        buffer = _first(self._given).new_empty(shape, dtype=dtype)
        self._index[id(buffer)] = kind, len(kept)
        kept.append(buffer)
        return buffer

    def launch(
        self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], **options: Any
    ) -> None:
        compiled = kernel[grid](**arguments, **options)
        if not isinstance(compiled, CompiledKernel):  # by the interpreter
            self._repeatable = False
            return
        ordered = [arguments[name] for name in kernel.arg_names]
        self._steps.append((compiled[(*grid, 1, 1)[:3]], ordered))

    def plan(self) -> Plan | None:
        """What was launched; None if it cannot be repeated."""
        if not self._repeatable:
            return None
        offsets, size = [], 0
        for buffer in self._scratch:
            offsets.append(size)
            size += math.ceil(buffer.nbytes / ALIGNMENT) * ALIGNMENT
        steps = [self._step(launch, ordered) for launch, ordered in self._steps]
        return Plan(steps, [(x.shape, x.dtype) for x in self._results], offsets, size)

    def _step(self, launch: Callable[..., None], ordered: list[Any]) -> Step:
        firsts = (0, len(self._given), len(self._given) + len(self._results))
        arguments, places = list(ordered), []
        for i, value in enumerate(ordered):
            if isinstance(value, Tensor):
                kind, number = self._index[id(value)]
                arguments[i] = None
                places.append((i, firsts[kind] + number))
        return Step(launch, arguments, places)


class Plan(NamedTuple):
    steps: list[Step]
    results: list[tuple[torch.Size, torch.dtype]]
    offsets: list[int]  # of the other buffers in the workspace [bytes]
    size: int  # of the workspace [bytes]

    def run(self, given: Sequence[Any]) -> list[Tensor]:
        """Launches everything again; the results, in the order in which they were asked for."""
        like = _first(given)
        made = [like.new_empty(shape, dtype=dtype) for shape, dtype in self.results]
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (*given, *made)]
        if self.size:
            workspace = like.new_empty(self.size, dtype=torch.uint8)
            start = workspace.data_ptr()
            addresses += [start + offset for offset in self.offsets]
        driver = triton.runtime.driver.active
        stream = driver.get_current_stream(driver.get_current_device())
        for launch, arguments, places in self.steps:
            filled = arguments.copy()
            for place, number in places:
                filled[place] = addresses[number]
            launch(*filled, stream=stream)
        return made


def _first(tensors: Sequence[Tensor | None]) -> Tensor:
    return next(tensor for tensor in tensors if tensor is not None)


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
