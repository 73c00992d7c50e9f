"""Calibration layer by layer: a model larger than memory, of which only one layer is there.

Every batch runs the model's own forward in a greenlet, which is suspended where it enters a layer.
The scheduler reads that layer, lets every batch that waits for it run on to its next one, and drops
the layer. No argument of a layer has to be known for this, and what is computed is what a plain
loop computes, bit for bit.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from reap.errors import ReapError
from reap.model.layerwise import Layerwise, Unit
from reap.runs.hidden import Place
from reap.statistics.stats import Statistics
from reap.text.batching import Batch


class Job:
    """One batch on its way through the model."""

    def __init__(self, batch: Batch, forward: Callable[[Batch], None], place: Place | None) -> None:
        self.batch = batch
        self.at: Unit | None = None  # where it is suspended
        self.steps = 0  # layers that it entered
        self.held = self.hidden = 0  # bytes that its layer was called with; of its hidden states
        self.place = place  # in a file, for these
        self.position = 0  # how many batches there were up to this one
        self.thread = greenlet(lambda: forward(batch))
        # Of its own: what the forward keeps in context variables is this batch's alone.
        self.thread.gr_context = contextvars.copy_context()


class Stream:
    """Runs batches through `layers.model`, one layer at a time. Inside `with stream.installed()`.

    What a job runs belongs to its batch's domain in `stats`. `progress` is called with tokens: of a
    batch that is half through its layers, half of them. `ran` is called whenever a job has run on.
    """

    def __init__(
        self,
        layers: Layerwise,
        forward: Callable[[Batch], None],
        stats: Statistics,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.layers, self.stats = layers, stats
        self.jobs: list[Job] = []  # that have not ended
        self.ran: Callable[[Job], None] | None = None
        self._forward, self._progress = forward, progress
        self._running: Job | None = None
        self._closing = False
        self._next: dict[Unit, Unit] = {}  # what followed a unit
        self._last: Unit | None = None
        self._weights = {
            x.untyped_storage().data_ptr() for x in layers.model.parameters() if not x.is_meta
        }

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Batches stop at their layers; none is left suspended behind it."""
        with ExitStack() as undo:
            undo.callback(self._close)
            for unit in self.layers.units:
                stop = self._stopper(unit)
                hook = unit.module.register_forward_pre_hook(stop, with_kwargs=True)
                undo.callback(hook.remove)
            yield

    def add(self, batch: Batch, place: Place | None = None, position: int = 0) -> Job:
        """Begin with a batch: it runs up to its first layer. While it waits, its hidden states are
        in `place`."""
        job = Job(batch, self._forward, place)
        job.position = position
        self.jobs.append(job)
        self._resume(job)
        return job

    def wanted(self) -> Unit | None:
        """The layer that the jobs which are furthest behind wait for; None when all have ended."""
        return min(self.jobs, key=lambda job: job.steps).at if self.jobs else None

    def run(self, unit: Unit, then: Callable[[Unit], None] | None = None) -> None:
        """Let all jobs that wait for `unit`, which is loaded, run on; `then` is called with what
        the first of them waits for."""
        for job in [job for job in self.jobs if job.at is unit]:
            while job.at is unit:
                self._resume(job)
            if then is not None and job.at is not None:
                then(job.at)
            then = None

    def step(self) -> bool:
        """Load the wanted layer, run it, and read the one that will follow meanwhile. False when
        all jobs have ended."""
        unit = self.wanted()
        if unit is None:
            return False
        if self._last is not None:
            self._next[self._last] = unit
        self._last, known = unit, self._next.get(unit)
        with self.layers.loaded(unit):
            if known is not None:
                self.layers.read_ahead(known)
            self.run(unit, None if known else self.layers.read_ahead)
            self.layers.send_ahead()
        return True

    def _resume(self, job: Job) -> None:
        job.at, self._running = None, job
        before = self._share(job)
        try:
            batch = job.batch
            with self.stats.domain(batch.domain), self.stats.counting(batch.counted):
                job.thread.switch()
        finally:
            self._running = None
            if job.thread.dead:
                self.jobs.remove(job)
        if self.ran is not None:
            self.ran(job)
        done = self._share(job) - before
        if self._progress is not None and done:
            self._progress(done)

    def _share(self, job: Job) -> int:
        """Tokens of the batch, by the layers that it went through."""
        if job.thread.dead:
            return job.batch.tokens
        depth = len(self.layers.text)
        return job.batch.tokens * min(max(0, job.steps - 1), depth) // depth

    def _stopper(self, unit: Unit) -> Callable[..., None]:
        def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
            job = self._running
            if self._closing:
                raise GreenletExit
            if job is None or getcurrent() is not job.thread:
                raise ReapError(
                    f"{type(module).__name__} ({unit.name}) cannot be suspended: it is called from "
                    "a thread that the model starts: such a model cannot be run layer by layer"
                )
            job.at = unit
            job.steps += 1
            hidden = args[0] if args else kwargs.get("hidden_states")
            storages = self._storages([args, kwargs])
            job.held = sum(storages.values())
            job.hidden = 0
            if isinstance(hidden, Tensor):
                job.hidden = storages.get(hidden.untyped_storage().data_ptr(), 0)
            place = job.place if job.hidden else None
            with nullcontext() if place is None else place.holds(hidden):
                job.thread.parent.switch()

        return stop

    def _storages(self, values: Any) -> dict[int, int]:
        """Address -> bytes of the memory of all tensors in `values` that are no weights."""
        found: dict[int, int] = {}
        for value in values.values() if isinstance(values, Mapping) else values:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
            elif isinstance(value, Mapping | list | tuple):
                found |= self._storages(value)
        return {place: size for place, size in found.items() if place not in self._weights}

    def _close(self) -> None:
        """Jobs that are suspended still end here, with all that they hold."""
        self._closing = True
        for job in self.jobs:
            while not job.thread.dead:  # a forward that catches it is stopped at its next layer
                with suppress(Exception):
                    job.thread.throw(GreenletExit)
        self.jobs.clear()
