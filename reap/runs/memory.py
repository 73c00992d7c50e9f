"""How much memory this process has, may have, and had at its peak [bytes]."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch

from reap.errors import ReapError

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
_UNITS = {"": 1, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(text: str) -> int:
    """ "24G", "24 GiB", "1.5e9": bytes; K, M, G and T are powers of 1,024, KB to TB of 1,000."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?)(i?b)?\s*", text, re.I)
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if found is None or not number:
        raise ReapError(f"{text!r} is not a size: write it like 24G or 512M")
    power = _UNITS[found[2].upper()] // 10 if found[2] else 0
    decimal = (found[3] or "").lower() == "b" and power
    return int(number * (1000**power if decimal else 1024**power))


def resident() -> int:
    """What this process has in memory, of its own and of files."""
    return _status("VmRSS")


def peak() -> int:
    """The most that it had since `reset_peak`; since it began, where that cannot be reset."""
    return _status("VmHWM")


def reset_peak() -> None:
    with suppress(OSError):
        (PROC / "self/clear_refs").write_text("5")


def give_back() -> None:
    """What was freed is the system's again."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc
        trim(0)


def allowed() -> int:
    """The most that this process may have: what it has, and what is free on the machine and in the
    control groups that it is in; there, what the system keeps of files counts as free."""
    free = [_field(PROC / "meminfo", "MemAvailable:") * 1024]
    free += [max(0, limit - used) for limit, used in _groups()]
    return resident() + min(free)


class Device:
    """The same, of what torch has on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def resident(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def give_back(self) -> None:
        """Torch keeps what was freed for itself, and that counts as free."""

    def allowed(self) -> int:
        free, _ = torch.cuda.mem_get_info(self._device)
        return free + torch.cuda.memory_reserved(self._device)


class Meter(Protocol):
    """This module, or a `Device`."""

    def resident(self) -> int: ...
    def peak(self) -> int: ...
    def reset_peak(self) -> None: ...
    def give_back(self) -> None: ...
    def allowed(self) -> int: ...


def meter_of(device: torch.device | None) -> Meter:
    """What measures the memory of a GPU, or else that of this process."""
    if device is None or device.type != "cuda":
        return sys.modules[__name__]
    return Device(device)


def _groups() -> Iterator[tuple[int, int]]:
    """(limit, used) of every control group around this process, of either version."""
    try:
        lines = (PROC / "self/cgroup").read_text().split()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, files = CGROUPS, ("memory.max", "memory.current", "file")
        elif "memory" in controllers.split(","):
            root = CGROUPS / "memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")
        else:
            continue
        place = root / path.strip("/")
        for group in (place, *place.parents):
            if not group.is_relative_to(root):
                break
            with suppress(OSError, ValueError):  # no such file, or "max"
                limit, used = (int((group / name).read_text()) for name in files[:2])
                yield limit, used - _field(group / "memory.stat", files[2])


def _status(name: str) -> int:
    return _field(PROC / "self/status", f"{name}:") * 1024


def _field(path: Path, name: str) -> int:
    """The number behind a name that begins a line."""
    found = re.search(rf"^{name}\s+(\d+)", path.read_text(), re.M)
    return int(found[1]) if found else 0
