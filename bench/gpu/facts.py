"""What this machine has: versions, the GPU, its driver and clocks, and what is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

NEEDED = ("torch", "triton", "transformers", "safetensors", "numpy", "typer", "rich", "pytest")
TO_BUILD = ("pybind11", "setuptools")
# Without these, less is tested or drawn.
OPTIONAL = {
    "hypothesis": "tests by it are left out; none is for a GPU",
    "matplotlib": "no plots",
    "liger_kernel": "no peer `liger`",
}
PROGRAMS = {
    "nvcc": "cuda and cuda_sm90 are not built",
    "g++": "the CPU backend is not built",
    "nvidia-smi": "no clocks and power",
    "compute-sanitizer": "make gpu-sanitize does not run",
}


def missing() -> list[str]:
    found = []
    for names, effect in ((NEEDED, "nothing runs"), (TO_BUILD, "nothing is built")):
        found += [f"{name}: {effect}" for name in names if not _has(name)]
    found += [f"{name}: {effect}" for name, effect in OPTIONAL.items() if not _has(name)]
    found += [f"{name}: {effect}" for name, effect in PROGRAMS.items() if not program(name)]
    return found


def _has(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def program(name: str) -> str | None:
    """Where a program is: in PATH, or where CUDA's usually are."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = (None, f"{home}/bin", f"{home}/compute-sanitizer")
    return next(filter(None, (shutil.which(name, path=place) for place in places)), None)


def gpu() -> dict[str, Any]:
    """Of the first GPU; raises where torch has none."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "sm": 10 * properties.major + properties.minor,
        "processors": properties.multi_processor_count,
        "gigabytes": round(properties.total_memory / 1e9, 1),
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
    }


SMI = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"


def smi() -> str | None:
    command = ["nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return f"{SMI}: {done.stdout.strip()}" if done.returncode == 0 else None


def commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None  # none: a copy without its history


def facts(device: str = "cuda") -> dict[str, Any]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*NEEDED, *TO_BUILD, *OPTIONAL):
        try:
            versions[name] = version(name.replace("_", "-"))
        except PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions,
        "commit": commit(),
        "cores": os.cpu_count(),
        "gpu": gpu() if device == "cuda" else {"name": "none, --device cpu"},
        "smi": smi(),
        "missing": missing(),
    }


def main(device: str, path: Path) -> int:
    found = facts(device)
    path.write_text(json.dumps(found))
    for line in found["missing"]:
        print(f"missing: {line}")
    return 0


if __name__ == "__main__":
    # Without arguments before anything else is imported: whether the rest can be.
    if len(sys.argv) == 1:
        sys.exit("\n".join(line for line in missing() if line.endswith("nothing runs")) or 0)
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
