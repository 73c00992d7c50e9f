"""Calibration layer by layer against calibration in memory, loading included.

The checkpoint has the layers of Qwen3-30B-A3B with as many experts as make eight layers of the size
that is asked for (of at most a gigabyte each: then more layers), drawn weights and a small
attention. Each run is a process of its own, the files are in the page cache, and `extra_bytes` is
the peak resident memory of the whole process. All must give the same statistics, bit for bit.

With `--limit 4G` another question: a run layer by layer that may have that much, in a control group
that holds it to it, pages of files included, against one that may have all of the machine. Before
each the files are dropped from the page cache.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from bench import cgroup, inputs, prune
from bench.gate import WrongResult
from bench.measure import Samples, Settings, rows
from bench.row import Row

LAYERS, LENGTH, LAYER_BYTES = 8, 1024, 1e9
ROWS = {"full": 8, "quick": 4, "smoke": 2}
OURS, WHOLE = "reap layer by layer", "in memory"


def run(settings: Settings) -> Iterator[Row]:
    folder = settings.scratch / "stream"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        hidden, inner = (64, 32) if settings.smoke else (prune.HIDDEN, prune.INNER)
        layers = max(LAYERS, math.ceil(settings.gigabytes * 1e9 / LAYER_BYTES))
        experts = max(16, round(settings.gigabytes * 1e9 / (layers * 3 * hidden * inner * 2)))
        weights = torch.empty(inputs.POOL, dtype=torch.bfloat16)
        inputs.fill(weights, hidden**-0.5)
        noise = weights.view(torch.uint8).numpy().tobytes()
        total = prune.write_checkpoint(folder, layers, hidden, inner, experts, noise)
        shape = f"{total / 1e9:.1f} GB, E{experts} H{hidden} I{inner} L{layers}"
        yield from _compare(settings, folder, shape)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compare(settings: Settings, folder: Path, shape: str) -> Iterator[Row]:
    limit, length = settings.limit, 16 if settings.smoke else LENGTH
    names = (OURS, WHOLE) if limit is None else (f"{OURS}, at most {limit}", f"{OURS}, all")
    samples = Samples({name: [] for name in names}, [])
    peaks: dict[str, int | None] = {}
    digests = set()
    for _ in range(settings.rounds):
        for name in names:
            with ExitStack() as undo:
                group = None
                if limit is not None:
                    _drop(folder)
                if limit is not None and name.endswith(f"at most {limit}"):
                    group = undo.enter_context(cgroup.limited(_size(limit)))
                sizes = (ROWS[settings.mode], length, torch.get_num_threads())
                words = [folder, name, limit if "at most" in name else "-", *sizes]
                command = [sys.executable, "-c", _CHILD, *map(str, words)]
                command = command if group is None else group.command(command)
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                digest, seconds, peak = done.stdout.split()
                digests.add(digest)
                peaks[name] = max(peaks.get(name) or 0, int(peak))
                samples.ms[name].append(1e3 * float(seconds))
                if "at most" in name:
                    held = f"a control group held it: {group.peak():,} bytes" if group else (
                        "no control group could be had: only its resident memory is known"
                    )  # fmt: skip
                    settings.say(f"stream: {name}: {int(peak):,} bytes resident; {held}")
    if len(digests) > 1:
        raise WrongResult(f"stream: {' and '.join(names)} give different statistics")
    tokens = ROWS[settings.mode] * length
    yield from rows("stream", ("bf16", shape, tokens), samples, extra=peaks, ours=names[0])


def _size(text: str) -> int:
    from reap.runs.memory import parse_size

    return parse_size(text)


def _drop(folder: Path) -> None:
    """From the page cache, as far as the system does it."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# Importing transformers and the class of the model is not timed.
_CHILD = f"""
import sys, time, pathlib, resource, torch, reap
from transformers import Qwen3MoeForCausalLM
from reap.model.load import load_model
from reap.runs import waves
folder, mode, limit = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
rows, length, threads = map(int, sys.argv[4:])
torch.set_num_threads(threads)
ids = torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(0))
batches = [{{"input_ids": row}} for row in ids.split(1)]
start = time.perf_counter()
if mode == {WHOLE!r}:
    stats = reap.calibrate(load_model(folder, device="cpu"), batches)
else:
    stats = reap.calibrate_streamed(folder, batches, memory_limit=None if limit == "-" else limit)
seconds = time.perf_counter() - start
print(stats.digest(), seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
