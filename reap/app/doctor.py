"""What this machine offers: versions, devices, each kernel backend or why it is missing, and
whether transformers and torch are as this package needs them."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

from reap.versions import TESTED, installed, releases

PACKAGES = ("reap-saliency", "torch", "triton", "transformers", "safetensors", "numpy")


@dataclass(frozen=True)
class Diagnosis:
    """`backends` maps a name to None when usable here, else to the reason; `caveats` says of some
    how little they have been run. `tested` maps a package to the oldest and newest release that the
    tests run with, `seams` what we use of it beyond its documentation to None, else to what
    changed there, what that stops and what to install. `memory` is in bytes."""

    versions: dict[str, str | None]
    processor: str
    threads: int
    memory: int
    devices: tuple[str, ...]
    backends: dict[str, str | None]
    caveats: dict[str, str]
    tested: dict[str, tuple[str, str]]
    seams: dict[str, str | None]

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
        tested=dict(TESTED),
        seams=_seams(),
    )


def _seams() -> dict[str, str | None]:
    from reap.model import compat

    found: dict[str, str | None] = {seam.name: None for seam in compat.SEAMS}
    for seam, fault in compat.changed().items():
        remedy = f"install {seam.package} {releases(seam.package)}"
        found[seam.name] = f"{fault}: stops {' and '.join(seam.works)}: {remedy}"
    return found


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
