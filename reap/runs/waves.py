"""Calibration of a model in a folder, layer by layer and in waves: as many batches at a time as
memory holds. After a wave its statistics are kept, and a run that ends early goes on from there."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from reap.errors import ReapError
from reap.files.units import sized
from reap.model.config import text_config
from reap.model.experts import pretrained
from reap.model.layerwise import Layerwise
from reap.model.mtplayer import Mtp
from reap.model.staging import CudaQueues
from reap.observation.patch import observe
from reap.runs import memory
from reap.runs.calibration import completed, forward_of, watching, what_runs
from reap.runs.cuts import cuts_between, next_cut
from reap.runs.cutsums import ByCut
from reap.runs.heads import own_mtp
from reap.runs.hidden import HiddenFile
from reap.runs.meetings import Meetings
from reap.runs.mode import check_streams
from reap.runs.partial import Partial
from reap.runs.ranks import Ranks
from reap.runs.room import Room, admission, measure
from reap.runs.stability import Stable, Watch
from reap.runs.streaming import Job, Stream
from reap.statistics.stats import Statistics
from reap.statistics.trace import Trace
from reap.text.batching import Batch, Batches


def calibrate_streamed(
    folder: str | PathLike[str] | Layerwise,
    batches: Iterable[Batch | Mapping[str, Any]],
    *,
    gates: str = "applied",
    pairs: bool = False,
    outputs: bool = False,
    coalitions: int = 0,
    logits: bool = False,
    trace: Trace | None = None,
    backend: str = "auto",
    deterministic: bool = False,
    mtp: Mtp | bool = True,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    memory_limit: int | str | None = None,
    wave_tokens: int | None = None,
    scratch: str | PathLike[str] | None = None,
    say: Callable[[str], None] | None = None,
    progress: Callable[[int], None] | None = None,
    partial: Partial | None = None,
    until: Stable | None = None,
    ranks: Ranks | None = None,
) -> Statistics:
    """`calibrate` of the model in `folder`, with one layer of it in memory at a time: the same
    statistics, on the CPU bit for bit. `device`: "cpu", or a GPU, which then holds two layers, what
    of the model stays and the tokens of a wave, as many as fit there.

    Batches go through the layers in waves, each layer is read once per wave while the one before it
    runs. A wave has as many tokens as `memory_limit` holds (bytes, or like "24G"; by default what
    the machine and its control groups have free), and at most `wave_tokens`. Hidden states that do
    not fit wait in a file without a name in `scratch` (by default the system's folder for temporary
    files), where that costs less than another wave. `partial` is written after every wave. `say` is
    called with a line about all this once it is known. `until` ends it behind a wave. In place of a
    folder, what `open_layers` gave, which is closed at the end.

    The other arguments are those of `calibrate` and `load_model`, and so are the errors. ReapError
    also for a model that cannot be run layer by layer, for a limit that does not hold a layer, for
    a disk that does not hold the file, and for weight files that change meanwhile.
    """
    limit = memory.allowed() if memory_limit is None else memory.parse_size(str(memory_limit))
    if wave_tokens is not None and wave_tokens < 1:
        raise ReapError(f"wave_tokens is {wave_tokens}: it has to be at least 1")
    recorded = batches if isinstance(batches, Batches) else None
    if partial is not None:
        partial.refuse_trace(trace)
    if partial is not None and recorded is None:
        raise ReapError("a run can be taken up again only with batches of reap.batches")
    layers = folder
    if not isinstance(layers, Layerwise):
        layers = open_layers(Path(layers), dtype, trust_remote_code, limit, device)
    if layers.staging is not None:
        limit = memory.meter_of(layers.staging.device).allowed()
    with ExitStack() as undo:
        undo.enter_context(closing(layers))
        model = layers.model
        _forget_what_layers_return(model)
        run: dict[str, Any] = {
            "run": what_runs(pretrained(model).base_model, backend, deterministic)
        }
        if until is not None:
            run["until"] = until.describe()
            if recorded is not None:
                until.check_text(recorded)
        stats = undo.enter_context(
            observe(
                model,
                gates=gates,
                pairs=pairs,
                outputs=outputs,
                coalitions=coalitions,
                logits=logits,
                trace=trace,
                backend=backend,
                deterministic=deterministic,
                mtp=own_mtp(model) if mtp is True else mtp or None,
            )
        )
        undo.enter_context(torch.inference_mode())
        watch = None if until is None else watching(until, stats.model, ranks, streamed=True)
        if partial is not None and recorded is not None:
            for batch in partial.take_up(stats, recorded, run, watch):
                if progress is not None:
                    progress(batch.tokens)
        if isinstance(watch, Meetings):
            watch.start()
        stream = Stream(layers, forward_of(model), stats, progress)
        undo.enter_context(stream.installed())
        copies, largest = 1, 1
        if recorded is not None:
            about = recorded.describe()
            copies, largest = len(about["sources"]), about["seq_len"] * about["batch_size"]
        if partial is not None:
            copies *= 3  # it remembers some, and writes others
        if watch is not None:
            copies += 8  # sums at cuts
        place = Path(scratch or tempfile.gettempdir())
        waves = Waves(stream, limit, wave_tokens, place, copies, largest, say or (lambda _: None))
        undo.enter_context(closing(waves))

        def keep(*domains: str) -> None:
            if partial is not None and recorded is not None:
                partial.keep(stats, [*domains], recorded, run)

        if watch is None:
            for wave in waves.run(batches):
                keep(*(job.batch.domain for job in wave))
        else:
            both = [stats] if partial is None else partial.both(stats)
            _until_stable(
                waves, batches, watch, ByCut(watch.sums, stats, watch.sums.read(both)), keep
            )
    total = stats if partial is None else partial.total(stats)
    if watch is not None:
        run["ended"] = watch.ended()
    return completed(total, recorded, run)


def _until_stable(
    waves: Waves,
    batches: Iterable[Batch | Mapping[str, Any]],
    watch: Watch | Meetings,
    sums: ByCut,
    keep: Callable[..., None],
) -> None:
    """Wave after wave, until `watch` is sure or the text ends."""
    recorded = batches if isinstance(batches, Batches) else None
    rest = iter(batches)
    waves.begun = watch.batches
    waves.stream.ran = lambda job: sums.ran(next_cut(job.position))
    while not watch.stable:
        bound = watch.bound()
        if recorded is not None:
            recorded.until = bound
            stretch: Iterable[Any] = recorded
        else:
            stretch = rest if bound is None else islice(rest, bound - waves.begun)

        def passed() -> None:
            end = waves.begun if recorded is None else recorded.position
            for cut in cuts_between(watch.batches, end):
                total = sums.take(cut)
                watch.passed(cut, lambda total=total: total)  # type: ignore[misc]
            watch.passed(end, sums.take)  # no cut: nothing is read

        for wave in waves.run(stretch):
            passed()
            keep(*(job.batch.domain for job in wave))
            if watch.stable:
                break
        passed()
        if not watch.meet(waves.begun if recorded is None else recorded.position, keep):
            break


def open_layers(
    folder: Path,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    limit: int | None = None,
    device: str = "cpu",
) -> Layerwise:
    """The model in `folder` without its layers. ReapError when `limit` bytes, or what is free, do
    not hold one of them, or for a `device` that does not run layer by layer."""
    check_streams(device)
    return Layerwise(
        folder,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        admit=admission(memory.allowed() if limit is None else limit),
        queues=None if device == "cpu" else CudaQueues(torch.device(device)),
    )


class Waves:
    """Sends batches through `stream` in waves. The first batch shows how large they may be."""

    def __init__(
        self,
        stream: Stream,
        limit: int,
        most: int | None,
        scratch: Path,
        copies: int,
        largest: int,
        say: Callable[[str], None],
    ) -> None:
        self.stream, self.limit, self.most, self.scratch = stream, limit, most, scratch
        self.copies, self.say = copies, say
        self.largest = largest  # tokens of a batch, padding included
        self.room: Room | None = None
        self.begun = 0  # batches
        self.tokens = 0  # of a wave, padding included
        self.in_memory = 0  # of these, that wait in memory
        self.file: HiddenFile | None = None

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def run(self, batches: Iterable[Batch | Mapping[str, Any]]) -> Iterator[list[Job]]:
        """Yields what ran in each wave when it has ended."""
        rest = iter(batches)
        expected = getattr(batches, "expected", None)

        def begin(given: Any, sent: int) -> Job:
            self.begun = getattr(batches, "position", self.begun + 1)
            return self._begin(Batch.of(given), sent)

        while (given := next(rest, None)) is not None:
            jobs = [begin(given, 0)]
            if self.room is None:
                self.plan(jobs[0], expected)
            sent = jobs[0].batch.input_ids.numel()
            while sent + self.largest <= self.tokens and (given := next(rest, None)) is not None:
                jobs.append(begin(given, sent))
                sent += jobs[-1].batch.input_ids.numel()
            while self.stream.step():
                memory.give_back()
            if self.file is not None:
                self.file.clear()
            yield jobs

    def _begin(self, batch: Batch, sent: int) -> Job:
        """A batch behind `sent` tokens of its wave; its hidden states in the file if memory has no
        place for them."""
        size = batch.input_ids.numel()
        self.largest = max(self.largest, size)
        waits = None
        if self.room is not None and self.file is not None and sent + size > self.in_memory:
            waits = self.file.place(math.ceil(size * self.room.hidden))
        return self.stream.add(batch, waits, self.begun)

    def plan(self, job: Job, expected: int | None) -> None:
        """How large waves are, judged by a batch that begins; of `expected` tokens in all."""
        layers = self.stream.layers.text
        stored = sum(map(self.stream.layers.stored, layers))
        self.room = room = measure(self.stream, job, self.limit, self.copies, self.largest)
        room.check(self.largest)
        most = min(n for n in (expected, self.most, sys.maxsize) if n is not None)
        self.tokens = self.in_memory = room.in_memory()
        if self.tokens < most and self.stream.layers.staging is None:
            self.tokens = room.with_file(self.scratch, len(layers), stored)
        self.tokens = min(self.tokens, self.most or self.tokens)
        spilled = room.in_file(min(self.tokens, most))
        where = f"hidden states in {room.of}"
        if spilled and self.stream.layers.staging is None:
            self.in_memory = min(self.tokens, most) - spilled
            size = math.ceil((spilled + self.largest) * room.hidden)
            self.file = HiddenFile(self.scratch, size)
            where = f"{sized(size)} of hidden states in a file in {self.scratch}"
        self.say(
            f"{len(layers)} layers of {sized(stored)}, at most "
            f"{max(min(self.tokens, most), self.largest):,} tokens at a time, {where}"
        )


def _forget_what_layers_return(model: Any) -> None:
    """A forward that keeps something of every layer for its caller keeps it for all batches."""
    for config in (model.config, text_config(model.config)):
        for name in ("output_hidden_states", "output_router_logits"):
            if getattr(config, name, False):
                setattr(config, name, False)
