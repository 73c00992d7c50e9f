"""Peak resident memory of one call, from the kernel's own high-water mark."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


def available() -> int:
    """Memory that can be had without swapping [bytes]."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) * 1024


def peak_extra(call: Callable[[], Result]) -> tuple[Result, int | None]:
    """`call()` and its peak resident memory above what was resident before it [bytes], its result
    included; None where the kernel has no resettable mark.

    Counted are pages touched for the first time, so what an earlier call allocated and kept for
    reuse is not; freed heap is handed back first so that it counts again.
    """
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
