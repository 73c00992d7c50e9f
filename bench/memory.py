"""Peak memory of one call: resident, from the kernel's high-water mark, or of torch on a GPU."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")


def available(device: str = "cpu") -> int:
    """Memory that can be had without swapping [bytes]."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) * 1024


def peak_extra(call: Callable[[], Result], device: str = "cpu") -> tuple[Result, int | None]:
    """`call()` and its peak memory above what was there before it [bytes], its result included;
    None where the kernel has no resettable mark.

    On a CPU counted are pages touched for the first time, so what an earlier call allocated and
    kept for reuse is not; freed heap is handed back first so that it counts again.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        return result, torch.cuda.max_memory_allocated() - before
    _return_free_heap()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return call(), None
    before = _status("VmRSS")
    result = call()
    return result, max(0, _status("VmHWM") - before)


def _return_free_heap() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc
        trim(0)


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
