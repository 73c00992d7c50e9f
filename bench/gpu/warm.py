"""Compiles Triton's kernels for the tests and benches, in many processes: each leaves what it made
in Triton's cache on disk. A kernel is compiled by a call, so this needs the GPU, if not for long.

    python -m bench.gpu.warm cuda RESULT [PART OF]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.gpu import small

LAYERS = ("deepseek-v3", "mixtral-8x7b", "gpt-oss-120b-own", "qwen3-30b-a3b")
# Those of other tiles and orders; nothing is compiled for a number of tokens itself.
FEW = (4096, 1024, 64)
T_LARGE = 1 << 14
MOST_PROCESSES = 12


def jobs() -> list[dict[str, Any]]:
    """One call each, the slowest to compile first."""
    large: list[dict[str, Any]] = [
        {"shape": name, "T": T_LARGE, "deterministic": deterministic}
        for name in LAYERS
        for deterministic in (False, True)
    ]
    few: list[dict[str, Any]] = [
        {"shape": LAYERS[-1], "T": T, "deterministic": deterministic}
        for T in FEW
        for deterministic in (False, True)
    ]
    others = [{"small": i} for i in range(len(small.calls()))]
    return [
        *large,
        *few,
        {"norms": LAYERS[-1]},
        {"statistics": False},
        {"statistics": True},
        *others,
        *_of_tests(),
    ]


def _of_tests() -> list[dict[str, Any]]:
    """Those of tests/test_triton.py, in its dtypes."""
    from bench.gate import cases

    return [
        {"case": i, "dtype": i // 4 % 3, "deterministic": False}
        for i in range(0, len(cases().CASES), 4)
    ]


def compile(job: dict[str, Any], device: str) -> None:
    import torch

    from bench import norms
    from bench.gate import cases
    from reap.statistics.layerstats import LayerStatistics
    from reap_kernels import moe_saliency

    backend = "triton" if device == "cuda" else "auto"
    if "norms" in job:
        for T in (T_LARGE, 1024):
            norms.without_norms(_layer(job["norms"], T, device))()
        return
    if "statistics" in job:
        ids = torch.zeros(64, 8, dtype=torch.int64, device=device)
        gates, sizes = (torch.ones(64, 8, dtype=d, device=device) for d in (torch.bfloat16, None))
        statistics = LayerStatistics(128, pairs=job["statistics"], device=device)
        statistics.update(ids, gates, sizes, sizes)
        return
    deterministic = job.get("deterministic", False)
    if "small" in job:
        _, moved, deterministic = small.calls()[job["small"]]
        given = {k: v.to(device) if torch.is_tensor(v) else v for k, v in moved.items()}
    elif "case" in job:
        table = cases()
        given = table.make(table.CASES[job["case"]], table.DTYPES[job["dtype"]], device)
    else:
        given = _layer(job["shape"], job["T"], device)
    moe_saliency(**given, backend=backend, deterministic=deterministic)
    if device == "cuda":
        torch.cuda.synchronize()


def _layer(name: str, T: int, device: str) -> dict[str, Any]:
    """One expert for all: the same kernels, without gigabytes in each process."""
    import torch

    from bench import inputs
    from bench.shapes import REAL

    shape = REAL[name]
    weights = inputs.weights(shape, torch.bfloat16, device, experts=1)
    expanded = {key: weight.expand(shape.E, *weight.shape[1:]) for key, weight in weights.items()}
    return inputs.routed(shape, T, torch.bfloat16, device) | expanded


def work(device: str, part: int, parts: int, path: Path) -> int:
    """Every `parts`-th job; a line for each, so that one that fails costs no other."""
    wrong = 0
    with open(path, "a", buffering=1) as file:
        for job in jobs()[part::parts]:
            start = time.perf_counter()
            try:
                compile(job, device)
                error = None
            except Exception as found:
                error, wrong = f"{type(found).__name__}: {str(found)[:300]}", wrong + 1
            seconds = round(time.perf_counter() - start, 2)
            file.write(json.dumps(job | {"seconds": seconds, "error": error}) + "\n")
    return wrong


def main(device: str, path: Path, processes: int | None = None) -> int:
    count = processes or max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) - 2))
    command = [sys.executable, "-m", "bench.gpu.warm", device, str(path)]
    running = [subprocess.Popen([*command, str(part), str(count)]) for part in range(count)]
    return sum(process.wait() != 0 for process in running)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        sys.exit(main(sys.argv[1], Path(sys.argv[2])))
    sys.exit(work(sys.argv[1], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[2])))
