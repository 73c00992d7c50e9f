"""Experts in a ModuleList, in a block that routes by itself: code that comes with a checkpoint.

Such a block does not say which expert gets which token, or with what gate. Probing tells: the block
runs again with experts that return, in a column of their own, the numbers of their rows, digit by
digit. What comes out at a token in that column is its gate times the digit. A gate that is rounded
to zero lets no digit through, but NaN, which tells whose rows they were bit by bit.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reap.errors import ReapError
from reap.observation import measure
from reap.observation.layers import Layer
from reap.observation.measure import Measured

BASE = 32  # of the digits: gate * digit still tells the digit when it is rounded to bfloat16
# Of digits, so that what else the block adds up is small beside them; fp16 ends at 65,504.
PROBE_SCALE = {torch.bfloat16: 2.0**40, torch.float16: 2.0**9, torch.float32: 2.0**40}
CHECKED = 16  # columns of the block's output that are compared with the sum of its experts'

Write = Callable[[Tensor], Tensor]  # the numbers of rows [n] -> what their expert returns there


class KeptExperts(nn.ModuleList):
    """Those of a layer's experts that a mask leaves, in the place of all of them."""


@dataclass
class _Call:
    """One call of an expert with n rows, of which the first is its row number `first`."""

    first: int
    like: Tensor  # shaped, typed and placed as its output; holds no memory of its own
    norms: Tensor  # [n] fp32
    peaks: Tensor  # [n] fp32
    sample: Tensor  # [n, CHECKED] fp32: some columns of its output
    rows: Tensor | None  # its output [n, H], where sums over slots are wanted: else not held


class _Now(threading.local):
    """What this thread does: run the block, with its calls so far, or probe it."""

    calls: list[list[_Call]] | None = None  # by expert
    answer: Callable[[int, torch.Size], Tensor] | None = None  # of an expert for rows shaped so


class Listed:
    """The experts of one layer, while they are observed."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.block = layer, layer.experts.block
        self.experts: list[nn.Module] = list(layer.experts.module)
        self.now = _Now()

    def __deepcopy__(self, memo: Any) -> Listed:
        raise self.layer.unobservable(
            "it is copied while it is observed: copy the model before or after"
        )

    def install(self, undo: ExitStack) -> None:
        """Stand between the block and its experts, until `undo`."""
        if None in self.experts or len(set(self.experts)) < len(self.experts):
            raise self.layer.unobservable("some of its experts are not here, or twice")
        ours = []
        for number, expert in enumerate(self.experts):
            ours.append(partial(self._expert, number, expert.forward))
            undo.callback(_put_back, expert, vars(expert).get("forward"), ours[-1])
            vars(expert)["forward"] = ours[-1]

        def replaced() -> bool:
            now = [vars(expert).get("forward") for expert in self.experts]
            return list(self.layer.experts.module) != self.experts or now != ours

        self.layer.replaced = replaced
        undo.callback(self.block.register_forward_pre_hook(self._begin).remove)
        undo.callback(self.block.register_forward_hook(self._end, with_kwargs=True).remove)

    def _begin(self, *_: Any) -> None:
        self.now.calls, self.now.answer = [[] for _ in self.experts], None

    def _expert(self, number: int, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of the forward of one expert."""
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if self.now.answer is not None:
            return self.now.answer(number, given[0].shape[:-1])
        out = own(*args, **kwargs)
        if self.now.calls is not None:
            calls = self.now.calls[number]
            calls.append(self._measure(given, out, sum(len(call.norms) for call in calls)))
        return out

    @torch.no_grad()
    def _measure(self, given: list[Tensor], out: Any, first: int) -> _Call:
        if len(given) != 1 or not isinstance(out, Tensor) or out.shape[:-1] != given[0].shape[:-1]:
            raise self.layer.unobservable("its experts do not map hidden states to hidden states")
        y = out.flatten(0, -2).float()
        return _Call(
            first,
            out.new_empty(1).expand(out.shape),
            torch.linalg.vector_norm(y, dim=1),
            y.abs().amax(dim=1),
            y[:, :CHECKED].clone(),
            out.flatten(0, -2) if self.layer.observer.outputs else None,
        )

    @torch.no_grad()
    def _end(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls, self.now.calls = self.now.calls or [], None
        out = _rows(output)
        if len(out) == 0:
            return
        if not any(calls):
            raise self.layer.unobservable("its block does not call its experts")
        self.layer.check_device(out.device.type)
        self.layer.observer.say_once(
            f"{type(self.block).__name__} runs as it is, with a few extra forwards without its "
            "experts for its statistics: it is not on transformers' experts interface"
        )
        rest = self._probe(calls, 0, torch.zeros_like, args, kwargs)  # all but experts [T,H]
        scale = PROBE_SCALE.get(out.dtype, PROBE_SCALE[torch.float32])

        def answers(write: Write) -> Tensor:
            """[T,E]; a block with more experts than columns is probed several times."""
            E, H = len(calls), out.shape[1]
            parts = [
                self._probe(calls, first, lambda rows: scale * write(rows), args, kwargs) - rest
                for first in range(0, E, H)
            ]
            return torch.cat(parts, dim=1)[:, :E] / scale

        gates = answers(torch.ones_like)
        row, divisor = torch.zeros_like(gates), torch.where(gates == 0, 1, gates)
        for place in _places(max(sum(len(call.norms) for call in own) for own in calls)):
            digit = answers(partial(_digit, place))
            row += place * ((digit / divisor).round() - 1)
        chosen, row = self._with_zero_gates(answers, gates != 0, row.long(), calls)
        self._record(out, rest, gates, chosen, row, calls)

    def _with_zero_gates(
        self,
        answers: Callable[[Write], Tensor],
        chosen: Tensor,
        row: Tensor,
        calls: list[list[_Call]],
    ) -> tuple[Tensor, Tensor]:
        """`chosen` and `row` [T,E] with the slots whose gate is zero. In a block that runs more
        experts on a token than its router chooses, these are no choice."""
        rows, top_k = [sum(len(call.norms) for call in own) for own in calls], self.layer.info.top_k
        if not int(chosen.sum()) < sum(rows) <= len(chosen) * top_k:
            return chosen, row
        reached = answers(lambda rows: rows * math.nan).isnan()
        lost = reached & ~chosen & (reached.sum(1, keepdim=True) <= top_k)
        found = torch.zeros_like(row)
        for bit in range(max(rows).bit_length() if bool(lost.any()) else 0):
            write = partial(_nan_where_set, bit)
            found += answers(write).isnan().long() << bit
        return chosen | lost, torch.where(lost, found, row)

    def _probe(
        self, calls: list[list[_Call]], first: int, write: Write, args: Any, kwargs: Any
    ) -> Tensor:
        """The block's output [T,H] fp32 when expert first + c answers in column c."""
        left = [list(own) for own in calls]

        def answer(number: int, shape: torch.Size) -> Tensor:
            if not left[number] or left[number][0].like.shape[:-1] != shape:
                raise self.layer.unobservable("its block routes otherwise when it runs again")
            call = left[number].pop(0)
            out = torch.zeros_like(call.like, memory_format=torch.contiguous_format)
            rows = out.flatten(0, -2)
            if 0 <= number - first < rows.shape[1]:
                numbers = torch.arange(len(rows), device=rows.device) + call.first
                rows[:, number - first] = write(numbers).to(rows.dtype)
            return out

        self.now.answer = answer
        try:
            return _rows(self.block.forward(*args, **kwargs)).float()
        finally:
            self.now.answer = None

    def _record(
        self,
        out: Tensor,
        rest: Tensor,
        gates: Tensor,
        chosen: Tensor,
        row: Tensor,
        calls: list[list[_Call]],
    ) -> None:
        """Add the slots: token t has one at every expert with chosen[t,e], there row[t,e]."""
        E = len(calls)
        flat = [call for own in calls for call in own]
        rows = torch.tensor([sum(len(c.norms) for c in own) for own in calls], device=row.device)
        index = rows.cumsum(0) - rows + row  # [T,E] into the rows of all experts
        known = (row >= 0) & (row < rows)
        uses = index[chosen & known].bincount(minlength=1)
        if not bool(known[chosen].all()) or int(uses.max()) > 1:
            raise self.layer.unobservable("its output is not a weighted sum of its experts'")

        K = max(1, int(chosen.sum(1).max()))
        ids = (~chosen).long().argsort(dim=1, stable=True)[:, :K]  # the chosen first, ascending
        real = chosen.gather(1, ids)
        slot = torch.where(real, index.gather(1, ids), 0)
        gates = gates.gather(1, ids)

        def of_slots(column: str) -> Tensor:
            values = torch.cat([getattr(call, column) for call in flat])[slot]
            return torch.where(real if values.dim() == 2 else real[..., None], values, 0)

        total = (gates[..., None] * of_slots("sample")).sum(1) + rest[:, :CHECKED]
        try:
            measure.check_sum(total, out[:, :CHECKED])
        except ReapError as error:
            raise self.layer.unobservable(str(error)) from error
        slots = self.layer.observer.slots(self.layer, torch.where(real, ids, E), gates)
        sums = None
        if slots.weights is not None:
            rows = torch.cat([call.rows for call in flat if call.rows is not None])
            sums = measure.new_sums(E, out)
            for k in range(K):
                chosen = rows[slot[:, k]]
                measure.add_rows(sums, slots.ids[:, k], slots.weights[:, :, k], chosen)
        measured = Measured(out, of_slots("norms"), of_slots("peaks"), None, sums)
        self.layer.observer.record(self.layer, slots, measured)


def _rows(output: Any) -> Tensor:
    """What a block returns, [T,H]: its output alone, or before other things."""
    return (output[0] if isinstance(output, tuple) else output).flatten(0, -2)


def _digit(place: int, rows: Tensor) -> Tensor:
    """One digit of the numbers of rows, from 1: 0 is no answer."""
    return rows // place % BASE + 1


def _nan_where_set(bit: int, rows: Tensor) -> Tensor:
    return torch.where((rows >> bit) % 2 == 1, math.nan, 0.0)


def _places(rows: int) -> list[int]:
    """1, BASE, BASE^2 ...: the digits that numbers below `rows` need."""
    places: list[int] = []
    while BASE ** len(places) < rows:
        places.append(BASE ** len(places))
    return places


def _put_back(expert: nn.Module, forward: Any, ours: Any) -> None:
    """`forward` is the instance's own, which offloading sets, or None for the class's. One that
    another program set over ours is left to it: ours then passes its calls on."""
    if vars(expert).get("forward") is not ours:
        return
    del vars(expert)["forward"]
    if forward is not None:
        vars(expert)["forward"] = forward
