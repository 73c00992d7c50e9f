"""Calibration layer by layer: a model larger than memory, of which only one layer is there.

Every batch runs the model's own forward in a greenlet, which is suspended where it enters a layer.
The scheduler reads that layer, lets every batch that waits for it run on to its next one, and drops
the layer. No argument of a layer has to be known for this, and what is computed is what a plain
loop computes, bit for bit.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

from reap.errors import ReapError
from reap.model.layerwise import Layerwise, Unit
from reap.statistics.stats import Statistics
from reap.text.batching import Batch


class Job:
    """One batch on its way through the model."""

    def __init__(self, batch: Batch, forward: Callable[[Batch], None]) -> None:
        self.batch = batch
        self.at: Unit | None = None  # where it is suspended
        self.steps = 0  # layers that it entered
        self.thread = greenlet(lambda: forward(batch))
        # Of its own: what the forward keeps in context variables is this batch's alone.
        self.thread.gr_context = contextvars.copy_context()


class Stream:
    """Runs batches through `layers.model`, one layer at a time. Inside `with stream.installed()`.

    What a job runs belongs to its batch's domain in `stats`.
    """

    def __init__(
        self, layers: Layerwise, forward: Callable[[Batch], None], stats: Statistics
    ) -> None:
        self.layers, self.forward, self.stats = layers, forward, stats
        self.jobs: list[Job] = []  # that have not ended
        self._running: Job | None = None
        self._closing = False
        self._next: dict[Unit, Unit] = {}  # what followed a unit
        self._last: Unit | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Batches stop at their layers; none is left suspended behind it."""
        with ExitStack() as undo:
            undo.callback(self._close)
            for unit in self.layers.units:
                hook = unit.module.register_forward_pre_hook(self._stopper(unit))
                undo.callback(hook.remove)
            yield

    def add(self, batch: Batch) -> Job:
        """Begin with a batch: it runs up to its first layer."""
        job = Job(batch, self.forward)
        self.jobs.append(job)
        self._resume(job)
        return job

    def step(self) -> Unit | None:
        """Let the jobs that are furthest behind run through the layer that they wait for, with all
        others that wait for it. Returns it; None when all jobs have ended."""
        if not self.jobs:
            return None
        unit = min(self.jobs, key=lambda job: job.steps).at
        assert unit is not None
        if self._last is not None:
            self._next[self._last] = unit
        self._last = unit
        with self.layers.loaded(unit):
            self._read_ahead(self._next.get(unit))
            for job in [job for job in self.jobs if job.at is unit]:
                while job.at is unit:
                    self._resume(job)
                self._read_ahead(self._next.get(unit) or job.at)
        return unit

    def _read_ahead(self, unit: Unit | None) -> None:
        if unit is not None:
            self.layers.read_ahead(unit)

    def _resume(self, job: Job) -> None:
        job.at, self._running = None, job
        try:
            with self.stats.domain(job.batch.domain):
                job.thread.switch()
        except Exception as error:
            said = _met_meta(error, self.layers.model)
            if said is None:
                raise
            raise said from error
        finally:
            self._running = None
            if job.thread.dead:
                self.jobs.remove(job)

    def _stopper(self, unit: Unit) -> Callable[..., None]:
        def stop(module: nn.Module, _: Any) -> None:
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
            job.thread.parent.switch()

        return stop

    def _close(self) -> None:
        """Jobs that are suspended still end here, with all that they hold."""
        self._closing = True
        for job in self.jobs:
            while not job.thread.dead:  # a forward that catches it is stopped at its next layer
                with suppress(Exception):
                    job.thread.throw(GreenletExit)
        self.jobs.clear()


def _met_meta(error: Exception, model: nn.Module) -> ReapError | None:
    """What to say of a computation that met weights which are not there."""
    if "meta" not in str(error).lower():
        return None
    names = {id(module): name for name, module in model.named_modules()}
    frame, module = error.__traceback__, model
    while frame is not None:
        own = frame.tb_frame.f_locals.get("self")
        module = own if id(own) in names else module
        frame = frame.tb_next
    name = f" ({names[id(module)]})" if names[id(module)] else ""
    return ReapError(
        f"{type(module).__name__}{name} uses weights of a layer outside of the layer's own call: "
        "such a model cannot be run layer by layer"
    )
