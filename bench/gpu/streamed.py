"""A model calibrated layer by layer against in memory, on the same device: `python -m
bench.gpu.streamed cuda out.json`. Both have to give the same statistics, bit for bit; how long each
took, loading included, and the most that torch had on the GPU are in the file."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import reap
from bench import inputs, prune
from reap.model.load import load_model

LAYERS, EXPERTS, ROWS, LENGTH = 6, 64, 8, 1024
SMALL = {"hidden": 64, "inner": 32}


def main(device: str, out: str, smoke: str = "") -> int:
    sizes = SMALL if smoke else {"hidden": prune.HIDDEN, "inner": prune.INNER}
    rows, length = (2, 16) if smoke else (ROWS, LENGTH)
    weights = torch.empty(inputs.POOL, dtype=torch.bfloat16)
    inputs.fill(weights, sizes["hidden"] ** -0.5)
    ids = torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": row} for row in ids.split(1)]
    options: dict[str, Any] = {"deterministic": True}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        noise = weights.view(torch.uint8).numpy().tobytes()
        found["bytes"] = prune.write_checkpoint(base, LAYERS, experts=EXPERTS, noise=noise, **sizes)
        ways: dict[str, Callable[[], Any]] = {
            "in memory": lambda: reap.calibrate(
                load_model(base, device=device), batches, **options
            ),
            "layer by layer": lambda: reap.calibrate_streamed(
                base, batches, device=device, **options
            ),
        }
        for name in [*ways, *ways]:  # the second time all kernels are compiled
            if device != "cpu":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            digest = ways[name]().digest()
            seconds = time.perf_counter() - start
            most = torch.cuda.max_memory_allocated(device) if device != "cpu" else 0
            found[name] = {"digest": digest, "seconds": seconds, "most": most}
            print(name, found[name], flush=True)
    found["same"] = found["in memory"]["digest"] == found["layer by layer"]["digest"]
    Path(out).write_text(json.dumps(found))
    return 0 if found["same"] else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
