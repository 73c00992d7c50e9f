"""Weights on their way to a GPU, while it computes with those that are there.

    copies     |  layer 1  |           |  layer 2  |          | ...
    computes               |  layer 0 ......  |  layer 1 ......  |
                                       waits: layer 2 takes the place of 0

Two queues of work, that of copies and the one that computes, wait for each other by events; the
host waits for neither, but for a piece of pinned memory that is still being copied from. A layer is
copied into memory that the one before the running one had: two are on the device, never three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

PIECE = 128 << 20  # bytes of pinned memory, twice


class Queues(Protocol):
    """Of a device. Events are behind all that was issued to their queue so far."""

    device: torch.device

    def pinned(self, size: int) -> Tensor:
        """[size] uint8 on the CPU, from which is copied."""

    def room(self, like: Tensor) -> Tensor:
        """Memory on the device, for copies into it."""

    def copy(self, to: Tensor, pinned: Tensor) -> None: ...

    def copied(self) -> Any:
        """An event."""

    def computed(self) -> Any:
        """An event."""

    def copies_wait(self, event: Any) -> None: ...

    def computing_waits(self, event: Any) -> None: ...

    def host_waits(self, event: Any) -> None: ...


class CudaQueues:
    """Those of a GPU: it computes in its current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device)

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def room(self, like: Tensor) -> Tensor:
        with torch.cuda.stream(self._copies):  # whose memory is used again by copies alone
            return torch.empty_like(like, device=self.device)

    def copy(self, to: Tensor, pinned: Tensor) -> None:
        with torch.cuda.stream(self._copies):
            to.copy_(pinned, non_blocking=True)

    def copied(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._copies)
        return event

    def computed(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def copies_wait(self, event: torch.cuda.Event) -> None:
        self._copies.wait_event(event)

    def computing_waits(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def host_waits(self, event: torch.cuda.Event) -> None:
        event.synchronize()


class Sent(NamedTuple):
    """Tensors that are being copied, and the event behind the last of them."""

    tensors: list[Tensor]
    event: Any


class Staging:
    """Sends weights from the CPU to the device of `queues`: what is sent is taken before it is
    used, and dropped, when all that uses it was issued, before the next but one is sent."""

    def __init__(self, queues: Queues, piece: int = PIECE) -> None:
        self._queues = queues
        self._pieces = [queues.pinned(piece) for _ in range(2)]
        self._copied: list[Any] = [None, None]  # events behind their last use
        self._turn = 0
        self._used: Any = None  # the event behind the last use of what was dropped

    @property
    def device(self) -> torch.device:
        return self._queues.device

    def send(self, tensors: Sequence[Tensor]) -> Sent:
        """Issue copies, which begin when what was dropped is not used any more."""
        if self._used is not None:
            self._queues.copies_wait(self._used)
            self._used = None
        with torch.inference_mode(False), torch.no_grad():
            made = [self._send(tensor) for tensor in tensors]
        return Sent(made, self._queues.copied())

    def take(self, sent: Sent) -> list[Tensor]:
        """What was sent: all that is computed from here on waits for it."""
        self._queues.computing_waits(sent.event)
        return sent.tensors

    def drop(self) -> None:
        """All that uses what was taken was issued."""
        self._used = self._queues.computed()

    def _send(self, tensor: Tensor) -> Tensor:
        made = self._queues.room(tensor)
        if made.stride() != tensor.stride():  # it had gaps
            tensor = tensor.contiguous()
            made = self._queues.room(tensor)
        source, target = _bytes(tensor), _bytes(made)
        for start in range(0, len(source), len(self._pieces[0])):
            self._turn = 1 - self._turn
            piece, copied = self._pieces[self._turn], self._copied[self._turn]
            if copied is not None:
                self._queues.host_waits(copied)
            some = source[start : start + len(piece)]
            piece[: len(some)].copy_(some)
            self._queues.copy(target[start : start + len(some)], piece[: len(some)])
            self._copied[self._turn] = self._queues.copied()
        return made


def _bytes(tensor: Tensor) -> Tensor:
    """[N] uint8: the memory of a tensor without gaps, in whatever order its elements are."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8)
