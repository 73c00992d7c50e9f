"""How many tokens may be on their way through a model at once, by what the first batch showed.

    limit = fixed + tokens * held

`fixed` is the program, what of the model stays, a layer, the bytes of the next and a batch that
runs; `held` is what a token that waits for its layer takes. Hidden states, a part of it, can wait
in a file instead. Whether they should is a question of bytes: the file is written and read at every
layer, a second wave reads all layers again.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reap.errors import ReapError
from reap.files.units import sized
from reap.model.layerwise import Needs
from reap.runs import memory
from reap.runs.streaming import Job, Stream
from reap.statistics.setcounts import PENDING, set_size
from reap.statistics.stats import Statistics

MARGIN = 0.05  # of the limit, for what cannot be known
FRAMES = 256 << 10  # bytes of a suspended forward beside its tensors: its frames and its stack
DISK = 0.5  # of what is free, at most, for hidden states


@dataclass
class Room:
    """What there is, and what is needed [bytes]."""

    limit: int
    fixed: int
    held: float  # per token, padding included
    hidden: float  # of `held`, per token: what may wait in a file
    running: int = 0  # of `fixed`, by a batch while it runs
    of: str = "memory"
    how: str = " (--memory-limit)"  # to have more of it

    @property
    def free(self) -> float:
        return self.limit * (1 - MARGIN) - self.fixed

    def check(self, tokens: int) -> None:
        """ReapError when a batch of so many tokens has no room."""
        if self.free < tokens * self.held:
            need = (self.fixed + tokens * self.held) / (1 - MARGIN)
            raise ReapError(
                f"{sized(self.limit)} of {self.of} do not hold one layer, the next and a batch of "
                f"{tokens:,} tokens: that takes {sized(round(need))}{self.how}, less with a "
                "smaller --batch-size or --seq-len"
            )

    def in_memory(self) -> int:
        """Tokens of a wave without a file."""
        return int(self.free / self.held)

    def with_file(self, folder: Path, layers: int, stored: int) -> int:
        """Tokens of a wave whose hidden states wait in a file in `folder`; those of a wave without
        one where that costs less. `stored` are the bytes of the `layers`."""
        plain = self.in_memory()
        if 2 * layers * self.hidden * plain >= stored or self.hidden <= 0:
            return plain
        disk = int(DISK * shutil.disk_usage(folder).free)
        rest = max(self.held - self.hidden, 1.0)
        return max(plain, int(min(self.free / rest, (self.free + disk) / self.held)))

    def in_file(self, tokens: int) -> int:
        """Of so many tokens that wait, those whose hidden states have to wait in the file."""
        overflow = tokens * self.held - self.free
        return min(tokens, math.ceil(overflow / self.hidden)) if overflow > 0 else 0


def admission(limit: int) -> Callable[[Needs], None]:
    """Refuses, with a ReapError, a model of which `limit` bytes do not hold one layer."""

    def admit(needs: Needs) -> None:
        need = round((memory.resident() + needs.stays + needs.layer) / (1 - MARGIN))
        if need > limit:
            raise ReapError(
                f"{sized(limit)} of memory do not hold one layer: {needs.name} takes "
                f"{sized(needs.layer)} while it is loaded, {sized(needs.stays)} of the model stay, "
                f"and so {sized(need)} are needed (--memory-limit), and more for the batches"
            )

    return admit


def measure(stream: Stream, job: Job, limit: int, copies: int, largest: int) -> Room:
    """What the first batch needs, by sending it through the layers up to the first with experts. It
    stays behind that, and the others can follow it. There will be `copies` of the statistics, and
    batches of `largest` tokens."""
    layers, tokens = stream.layers, max(1, job.batch.input_ids.numel())
    gpu = layers.staging is not None
    meter = memory.meter_of(layers.staging.device if layers.staging is not None else None)
    made = max(unit.nbytes for unit in layers.text)
    held, hidden, loading, running = job.held, job.hidden, 0.0, 0
    while (unit := stream.wanted()) is not None:
        meter.give_back()
        meter.reset_peak()
        before = meter.resident()
        with layers.loaded(unit):
            loading = (meter.peak() - before) / max(1, unit.nbytes)
            meter.reset_peak()
            before = meter.resident()
            stream.run(unit)
            running = max(running, meter.peak() - before)
        held, hidden = max(held, job.held), max(hidden, job.hidden)
        if unit.has_experts:
            break
    meter.give_back()
    base = meter.resident() - job.held
    # Beside the layer that runs, what is read of the next one; of that on a GPU what is made.
    following = made if gpu else max(layers.stored(unit) for unit in layers.text)
    running = round(running * max(1.0, largest / tokens))
    fixed = base + max(made + following + running, round(made * loading))
    fixed += copies * _sums(stream.stats)
    if gpu:
        return Room(limit, fixed, held / tokens, hidden / tokens, running, "the GPU's memory", "")
    return Room(limit, fixed, (held + FRAMES) / tokens, hidden / tokens, running)


def _sums(stats: Statistics) -> int:
    """Bytes of the statistics of all layers."""
    layers = [sum(x.nbytes for x in stats[name].tensors().values()) for name in stats.layers]
    # A layer that has not run yet does not know the sizes of its sums of vectors.
    sums = max(layers, default=0) * len(layers) if stats.outputs else sum(layers)
    if not stats.coalitions:
        return sums
    widths = [layer.top_k for layer in stats.model.layers]
    return sums + sum(stats.coalitions * set_size(K) + PENDING * 4 * K for K in widths)
