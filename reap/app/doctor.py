"""What this machine offers: versions, devices, and each kernel backend or why it is missing."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

from reap.versions import installed

PACKAGES = ("reap-saliency", "torch", "triton", "transformers", "safetensors", "numpy")


@dataclass(frozen=True)
class Diagnosis:
    """`backends` maps a name to None when usable here, else to the reason; `caveats` says of some
    how little they have been run. `memory` is in bytes."""

    versions: dict[str, str | None]
    processor: str
    threads: int
    memory: int
    devices: tuple[str, ...]
    backends: dict[str, str | None]
    caveats: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look at the machine; runs no kernel."""
    import torch

    import reap_kernels
    from reap_kernels.ops import LADDER

    devices = tuple(
        f"cuda:{index} {torch.cuda.get_device_name(index)}"
        for index in range(torch.cuda.device_count())
    )
    return Diagnosis(
        versions={"python": platform.python_version(), **installed(*PACKAGES)},
        processor=_processor(),
        threads=torch.get_num_threads(),
        memory=_memory(),
        devices=devices,
        backends=reap_kernels.backends(),
        caveats={b.NAME: b.CAVEAT for b in LADDER if hasattr(b, "CAVEAT")},
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux: the architecture's name has to do
    return platform.machine()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
