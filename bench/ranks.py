"""Two processes of one thread each, as torchrun starts them, against one process of two threads.

The checkpoint is that of `stream`, the text is drawn letters. Timed is a calibration of a model
that is loaded: from the first batch until the statistics of all are summed. `extra_bytes` is the
peak resident memory of one process. Both must give the same statistics, bit for bit, as one process
of one thread does.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator

import torch

from bench import inputs, prune
from bench.gate import WrongResult
from bench.measure import Samples, Settings, rows
from bench.row import Row

OURS, ONE, THREADS = "reap 2 ranks x 1 thread", "1 process x 1 thread", "1 process x 2 threads"
LAYERS, LENGTH = 4, 512
ROWS = {"full": 48, "quick": 24, "smoke": 4}


def run(settings: Settings) -> Iterator[Row]:
    folder = settings.scratch / "ranks"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        hidden, inner = (64, 32) if settings.smoke else (prune.HIDDEN, prune.INNER)
        experts = max(16, round(settings.gigabytes * 1e9 / (LAYERS * 3 * hidden * inner * 2)))
        weights = torch.empty(inputs.POOL, dtype=torch.bfloat16)
        inputs.fill(weights, hidden**-0.5)
        noise = weights.view(torch.uint8).numpy().tobytes()
        total = prune.write_checkpoint(folder / "base", LAYERS, hidden, inner, experts, noise)
        length, count = (16 if settings.smoke else LENGTH), ROWS[settings.mode]
        letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=length * count)
        (folder / "text.txt").write_text("".join(letters))
        (folder / "child.py").write_text(_CHILD)
        child = [str(folder / "child.py"), str(folder), str(length)]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        commands = {
            OURS: ([*torchrun, *child], 1),
            THREADS: ([sys.executable, *child], 2),
            ONE: ([sys.executable, *child], 1),
        }
        samples = Samples({name: [] for name in commands}, [])
        peaks: dict[str, int | None] = {}
        digests: dict[str, str] = {}
        for _ in range(settings.rounds):
            for name, (command, threads) in commands.items():
                env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
                digests[name], seconds, peak = done.stdout.split()
                peaks[name] = max(peaks.get(name) or 0, int(peak))
                samples.ms[name].append(1e3 * float(seconds))
        if digests[OURS] != digests[ONE]:
            raise WrongResult("ranks: two give other statistics than one process")
        shape = f"{total / 1e9:.1f} GB, E{experts} H{hidden} I{inner} L{LAYERS}"
        yield from rows("ranks", ("bf16", shape, count * length), samples, extra=peaks)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_CHILD = """
import sys, time, pathlib, resource, torch, reap
from transformers import Qwen3MoeForCausalLM
from reap.app.together import together
from reap.model.load import load_model
from reap.runs.partial import Partial
folder, length = pathlib.Path(sys.argv[1]), int(sys.argv[2])


class Letters:
    eos_token_id = pad_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) for letter in text]}


with together(None) as us:
    model = load_model(folder / "base", device="cpu")
    partial = Partial(us.partial_file(folder / "out"))
    text = str(folder / "text.txt")
    rows = reap.batches([text], Letters(), seq_len=length, shard=us.share)
    if us.ranks is not None:
        us.ranks.agree({})  # all begin together
    start = time.perf_counter()
    with partial.kept():
        stats = us.sum_of_all(
            reap.calibrate(model, rows, partial=partial, ranks=us.ranks),
            partial, rows, folder / "out",
        )
        seconds = time.perf_counter() - start
        if us.writes:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            print(stats.digest(), seconds, peak)
        us.release()
"""
