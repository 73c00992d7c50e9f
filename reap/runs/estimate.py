"""What a calibration will take, before it is begun: the way it will run, memory, bytes read, FLOPs
and time.

A batch of the text runs through the first layers of the model as a run layer by layer has them, one
of each kind, then one more goes the same way by the clock. Weights come from the model's own files,
so that rates of reading and of computing are those of this machine, these layers and this text; a
model of alike layers costs seconds whatever its depth. What is not run is taken to be like the
layers of its kind. A layer for multi-token prediction is run by itself, on numbers that are drawn.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from reap.model.layerwise import Layerwise, Unit
from reap.model.mtplayer import Mtp, embedding_names
from reap.observation.patch import observe
from reap.runs.calibration import forward_of
from reap.runs.disk import statistics_size
from reap.runs.room import MARGIN
from reap.runs.streaming import Stream
from reap.runs.waves import Waves
from reap.statistics.stats import Statistics
from reap.text.batching import Batch

log = logging.getLogger("reap")

PROBED = 3  # layers at least, by the clock
SECONDS = 20.0  # after which no further layer is begun


@dataclass(frozen=True)
class Step:
    """A layer that was run by the clock."""

    kind: str
    reading: float  # seconds per byte of the checkpoint, made ready to run
    running: float  # seconds per token


@dataclass(frozen=True)
class Estimate:
    """Of one run. Bytes, seconds and FLOPs (2 per weight that a token meets, without those of
    attention's scores); `tokens` are those of the text, None where that is not known, and with it
    `flops`, `seconds` and `bytes_read`. `tokens_per_second` is without reading,
    `seconds` without the start of the program."""

    layerwise: bool
    about: str  # of a run layer by layer: its waves
    memory: int  # at the peak, of the whole process, without ...
    mapped: int  # ... files, of which the system drops as much as it must
    stored: int  # of the weights in files
    statistics: int  # of the file that is written
    tokens_per_second: float
    tokens: int | None = None
    flops: int | None = None
    bytes_read: int | None = None
    seconds: float | None = None


def estimate(
    layers: Layerwise,
    batches: list[Batch],
    tokens: int | None,
    *,
    layerwise: bool,
    whole: int,
    limit: int,
    scratch: Path,
    gates: str = "applied",
    pairs: bool = False,
    outputs: bool = False,
    coalitions: int = 0,
    logits: bool = False,
    backend: str = "auto",
    deterministic: bool = False,
    mtp: Mtp | None = None,
    wave_tokens: int | None = None,
    domains: int = 1,
) -> Estimate:
    """Of a run over text that begins with `batches`, one or two, and has `tokens` tokens.

    layerwise: which way it is to run. whole: bytes of a process that has loaded all of the model.
    limit: bytes of memory that a run layer by layer may take. Hidden states would be in a file in
    `scratch`. The other options are those of `calibrate_streamed`, and so are the errors. `layers`
    are closed.
    """
    said: list[str] = []
    with ExitStack() as undo:
        undo.enter_context(closing(layers))
        undo.enter_context(_unsaid())  # most layers are never called
        stats = undo.enter_context(
            observe(
                layers.model,
                gates=gates,
                pairs=pairs,
                outputs=outputs,
                coalitions=coalitions,
                logits=logits,
                backend=backend,
                deterministic=deterministic,
                mtp=mtp,
            )
        )
        undo.enter_context(torch.inference_mode())
        stream = Stream(layers, forward_of(layers.model), stats)
        undo.enter_context(stream.installed())
        largest = max(batch.input_ids.numel() for batch in batches)
        copies = 3 * domains  # as of a run that can be taken up again
        waves = Waves(stream, limit, wave_tokens, scratch, copies, largest, said.append)
        undo.enter_context(closing(waves))
        waves.plan(stream.add(batches[0]), tokens)
        assert waves.room is not None
        # The layers that the first batch went through were read, so that they say nothing of it.
        ahead = max((job.steps for job in stream.jobs), default=1) - 1
        steps = _steps(stream, batches[-1], ahead + PROBED)
        sums = statistics_size(stats.model, pairs, domains, outputs, coalitions, logits)
        behind = 0.0 if mtp is None else _behind(mtp, batches[-1])
    found = {step.kind: [s for s in steps if s.kind == step.kind] for step in steps}
    per_token = [_of(unit, found) for unit in layers.text]
    # A layer for multi-token prediction stays in memory, and is as large there as in its files.
    extra = 0 if mtp is None else sum(weight.nbytes for weight in _own(mtp).values())
    stored = sum(map(layers.stored, layers.text))
    reading = statistics.median(step.reading for step in steps[ahead:] or steps)
    rate = 1 / (sum(per_token) + behind)
    waves_needed = 1
    if layerwise and tokens is not None:
        waves_needed = math.ceil(tokens / max(1, waves.tokens))
    peak = whole + extra + waves.room.running + 3 * sums
    if layerwise:
        waiting = min(tokens or waves.in_memory, waves.in_memory) * waves.room.held
        peak = round(min(waves.room.fixed + waiting, limit * (1 - MARGIN)))
    mapped = 0 if layerwise else stored + extra
    known = Estimate(layerwise, said[0], peak, mapped, stored + extra, sums, rate)
    if tokens is None:
        return known
    seconds = (stored + extra) * reading + tokens / rate
    if layerwise:  # the next layer is read while one runs
        seconds = sum(
            max(layers.stored(unit) * reading * waves_needed, cost * tokens)
            for unit, cost in zip(layers.text, per_token, strict=True)
        )
        seconds += extra * reading + tokens * behind
    return replace(
        known,
        tokens=tokens,
        flops=2 * tokens * (_met(layers, stats) + _met_behind(mtp)),
        bytes_read=waves_needed * stored + extra,
        seconds=seconds,
    )


def _steps(stream: Stream, batch: Batch, least: int) -> list[Step]:
    """Runs `batch` behind what waits in `stream`, layer by layer, until each kind of layer was run
    and `least` of them, or SECONDS have gone."""
    wanted = {_kind(unit) for unit in stream.layers.text}
    begun, steps = time.monotonic(), list[Step]()
    stream.add(batch)
    while (unit := stream.wanted()) is not None:
        enough = {step.kind for step in steps} == wanted and len(steps) >= least
        if enough or (steps and time.monotonic() - begun > SECONDS):
            break
        tokens = sum(job.batch.input_ids.numel() for job in stream.jobs if job.at is unit)
        start = time.monotonic()
        with stream.layers.loaded(unit):
            ready = time.monotonic()
            stream.run(unit)
            ran = time.monotonic() - ready
        stored = max(1, stream.layers.stored(unit))
        steps.append(Step(_kind(unit), (ready - start) / stored, ran / tokens))
    return steps


def _behind(mtp: Mtp, batch: Batch) -> float:
    """Seconds per token of a layer for multi-token prediction, which `observe` has."""
    rows, length = batch.input_ids.shape
    weight = mtp.projection.weight
    hidden = torch.randn(rows, max(1, length - 1), mtp.width).to(weight)
    seconds = []
    for _ in range(2):  # the first is slower
        start = time.monotonic()
        mtp(hidden, hidden)
        seconds.append(time.monotonic() - start)
    return min(seconds) / (rows * length)


def _own(mtp: Mtp) -> dict[str, torch.Tensor]:
    """Its weights by name, without the model's embeddings, which its stack never uses."""
    unused = {f"stack.{name}" for name in embedding_names(mtp.stack)}
    return {name: w for name, w in mtp.named_parameters() if name not in unused}


def _met_behind(mtp: Mtp | None) -> int:
    """How many weights a token meets in a layer for multi-token prediction."""
    if mtp is None:
        return 0
    shares = {
        id(weight): info.top_k / info.num_experts
        for one, info in zip(mtp.experts, mtp.layers, strict=True)
        for weight in one.module.parameters()
    }
    own = (w for w in _own(mtp).values() if w.dim() > 1)
    return round(sum(weight.numel() * shares.get(id(weight), 1.0) for weight in own))


@contextmanager
def _unsaid() -> Iterator[None]:
    """Without the notes that are for a run, which says them itself."""
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _kind(unit: Unit) -> str:
    """Layers of one kind have weights of the same names and shapes."""
    own = ((w.name.removeprefix(unit.name), tuple(w.away.shape)) for w in unit.weights)
    return f"{type(unit.module).__name__} {sorted(own)}"


def _of(unit: Unit, found: dict[str, list[Step]]) -> float:
    """Seconds per token of a layer; of a kind that was not run, those of the others."""
    own = found.get(_kind(unit)) or [step for steps in found.values() for step in steps]
    return statistics.median(step.running for step in own)


def _met(layers: Layerwise, stats: Statistics) -> int:
    """How many weights a token meets in all layers."""
    shares = {info.name: info.top_k / info.num_experts for info in stats.model.layers}
    met = 0.0
    for unit in layers.text:
        for weight in unit.weights:
            if weight.away.dim() > 1:
                share = next((s for n, s in shares.items() if weight.name.startswith(f"{n}.")), 1.0)
                met += weight.away.numel() * share
    return round(met)
