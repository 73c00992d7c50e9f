"""What configs and launches depend on, beside the addresses of tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from reap_kernels.contract import TENSORS, Call


def signature_of(call: Call) -> tuple[Any, ...]:
    """The config and the launches of calls with one signature are the same."""
    tensors: Any = call[: len(TENSORS)]
    return call.hidden_states.device, signature(tensors), call[len(TENSORS) :]


def signature(tensors: Iterable[Tensor | None]) -> tuple[Any, ...]:
    """Of these tensors all that a kernel is compiled for, and all numbers that it is launched with.

    Memory that is aligned to 16 bytes is read in vectors.
    """
    return tuple(
        [
            None
            if tensor is None
            else (tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16 == 0)
            for tensor in tensors
        ]
    )
