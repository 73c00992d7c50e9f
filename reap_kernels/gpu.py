"""Whether torch has a GPU in this process, and if not why."""

from __future__ import annotations

import os
from functools import cache

import torch

_used = _forked = False


def missing() -> str | None:
    """Why there is none, in one line; None if there is one."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built for CPUs only"
    if _forked:
        return (
            "this process was forked from one that had used the GPU, and CUDA does not survive "
            "that: start processes by spawn or forkserver"
        )
    return None if torch.cuda.is_available() else f"no GPU that torch can use: {_refusal()}"


@cache
def _refusal() -> str:
    """What torch says of the driver: that there is none, or that it is too old."""
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return " ".join(str(error).splitlines()[:1]).rstrip(".")
    return "torch counts none"


def _before() -> None:
    global _used
    _used = torch.cuda.is_initialized()


def _in_child() -> None:
    global _forked
    _forked = _forked or _used


os.register_at_fork(before=_before, after_in_child=_in_child)
