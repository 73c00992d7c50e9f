"""Calibration layer by layer against calibration in memory, loading included.

The checkpoint has the layers of Qwen3-30B-A3B with as many experts as make eight layers of the size
that is asked for, drawn weights and a small attention. Each run is a process of its own, the files
are in the page cache, and `extra_bytes` is the peak resident memory of the whole process. Both must
give the same statistics, bit for bit.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator

import torch

from bench import inputs, prune
from bench.gate import WrongResult
from bench.measure import Samples, Settings, rows
from bench.row import Row

LAYERS, LENGTH = 8, 1024
ROWS = {"full": 8, "quick": 4, "smoke": 2}
OURS, WHOLE = "reap layer by layer", "in memory"


def run(settings: Settings) -> Iterator[Row]:
    folder = settings.scratch / "stream"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        hidden, inner = (64, 32) if settings.smoke else (prune.HIDDEN, prune.INNER)
        experts = max(16, round(settings.gigabytes * 1e9 / (LAYERS * 3 * hidden * inner * 2)))
        length = 16 if settings.smoke else LENGTH
        weights = torch.empty(inputs.POOL, dtype=torch.bfloat16)
        inputs.fill(weights, hidden**-0.5)
        noise = weights.view(torch.uint8).numpy().tobytes()
        total = prune.write_checkpoint(folder, LAYERS, hidden, inner, experts, noise)
        peaks: dict[str, int] = {}
        digests: dict[str, str] = {}

        def calibrate(name: str) -> float:
            sizes = (ROWS[settings.mode], length, torch.get_num_threads())
            command = [sys.executable, "-c", _CHILD, str(folder), name, *map(str, sizes)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            digests[name], seconds, peak = done.stdout.split()
            peaks[name] = max(peaks.get(name, 0), int(peak))
            return float(seconds)

        samples = Samples({OURS: [], WHOLE: []}, [])
        for _ in range(settings.rounds):
            for name in samples.ms:
                samples.ms[name].append(1e3 * calibrate(name))
        if digests[OURS] != digests[WHOLE]:
            raise WrongResult("stream: layer by layer gives other statistics than in memory")
        shape = f"{total / 1e9:.1f} GB, E{experts} H{hidden} I{inner} L{LAYERS}"
        tokens = ROWS[settings.mode] * length
        yield from rows("stream", ("bf16", shape, tokens), samples, extra=dict(peaks))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# Importing transformers and the class of the model is not timed.
_CHILD = f"""
import sys, time, pathlib, resource, torch, reap
from transformers import Qwen3MoeForCausalLM
from reap.model.load import load_model
from reap.runs import waves
folder, mode = pathlib.Path(sys.argv[1]), sys.argv[2]
rows, length, threads = map(int, sys.argv[3:])
torch.set_num_threads(threads)
ids = torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(0))
batches = [{{"input_ids": row}} for row in ids.split(1)]
start = time.perf_counter()
if mode == {WHOLE!r}:
    stats = reap.calibrate(load_model(folder, device="cpu"), batches)
else:
    stats = reap.calibrate_streamed(folder, batches)
seconds = time.perf_counter() - start
print(stats.digest(), seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
