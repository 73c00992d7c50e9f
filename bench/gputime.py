"""How a GPU is timed: implementations in turn, each call on a cold L2 cache.

ms        GPU time: CUDA events around the replay of one call as a CUDA graph, so that no launch
          waits for the host; around the call itself where it cannot be captured ("events")
alone_ms  events around one call on an idle GPU: what the host does not hide is in it
host_ms   until that call returns, with nothing queued before it
"""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from statistics import median
from typing import Any

import torch

from bench import device

# A sample is that many seconds of calls, at most so many of them.
SAMPLE_SECONDS, MOST_CALLS = 0.02, 50
# Of the calls that are timed alone.
ALONE_SECONDS, FEWEST_ALONE, MOST_ALONE = 0.1, 5, 20
PROFILED_CALLS = 3
KERNELS = 16  # of the breakdown, the longest
NAME = 96  # characters of a kernel's name


@dataclass
class Detail:
    """What one implementation took, beside its samples."""

    method: str | None = None  # graph or events
    alone_ms: float | None = None
    host_ms: float | None = None
    clock_mhz: float | None = None
    power_w: float | None = None
    kernels: dict[str, float] = field(default_factory=dict)  # ms per call


@cache
def _flush_bytes() -> int:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return max(64 << 20, 2 * getattr(properties, "L2_cache_size", 0))


class _Timer:
    """One implementation: its call, or a graph of it, and what flushes the cache before it."""

    def __init__(self, call: Callable[[], Any], flush: torch.Tensor, *, graphs: bool) -> None:
        self.call, self.flush = call, flush
        self.graph = captured(call) if graphs else None
        self.replay: Callable[[], Any] = self.graph.replay if self.graph is not None else call
        self.spans: list[tuple[float, float]] = []
        start = time.perf_counter()
        self.events(1)
        self.calls = max(1, min(MOST_CALLS, int(SAMPLE_SECONDS / (time.perf_counter() - start))))

    def events(self, calls: int) -> list[float]:
        """GPU milliseconds of each of `calls`, queued one behind the other."""
        pairs = []
        start = time.perf_counter()
        for _ in range(calls):
            pairs.append(_between(self.flush, self.replay))
        torch.cuda.synchronize()
        self.spans.append((start, time.perf_counter()))
        return [first.elapsed_time(last) for first, last in pairs]

    def alone(self) -> tuple[float, float]:
        """Medians of one call at a time: by events, and until it returns. [ms]"""
        begun = time.perf_counter()
        events: list[float] = []
        host: list[float] = []
        while len(events) < MOST_ALONE and (
            len(events) < FEWEST_ALONE or time.perf_counter() - begun < ALONE_SECONDS
        ):
            torch.cuda.synchronize()
            first, last = _between(self.flush, lambda: host.append(_host(self.call)))
            torch.cuda.synchronize()
            events.append(first.elapsed_time(last))
        return median(events), median(host)


def _between(flush: torch.Tensor, call: Callable[[], Any]) -> tuple[Any, Any]:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    first.record()
    call()
    last.record()
    return first, last


def _host(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def captured(call: Callable[[], Any]) -> Any | None:
    """A CUDA graph of the call; None where it waits for the GPU or does what a graph cannot."""
    if _waits(call):
        return None
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    try:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError:
        torch.cuda.synchronize()  # a context that is broken says so here, and not in a later row
        return None
    return graph


def _waits(call: Callable[[], Any]) -> bool:
    """Asked before a capture, which such a call would break off halfway."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return False


def interleave(
    impls: dict[str, Callable[[], object]], rounds: int, seconds: float, *, graphs: bool = True
) -> tuple[dict[str, list[float]], dict[str, Detail]]:
    """A median [ms] per round of each implementation, and its details. Each has run before.

    One that has used up its seconds after three rounds leaves the turn.
    """
    gc.collect()
    gc.freeze()  # each capture collects: what is there now need not be looked at each time
    try:
        return _interleave(impls, rounds, seconds, graphs)
    finally:
        gc.unfreeze()


def _interleave(
    impls: dict[str, Callable[[], object]], rounds: int, seconds: float, graphs: bool
) -> tuple[dict[str, list[float]], dict[str, Detail]]:
    torch.cuda.empty_cache()
    flush = torch.empty(_flush_bytes(), dtype=torch.uint8, device="cuda")
    with device.metered() as meter:
        timers = {name: _Timer(call, flush, graphs=graphs) for name, call in impls.items()}
        samples: dict[str, list[float]] = {name: [] for name in impls}
        used = dict.fromkeys(impls, 0.0)
        names = list(impls)
        for done in range(rounds):
            names.append(names.pop(0))  # nobody always follows the same neighbour
            for name in names:
                if done >= 3 and used[name] > seconds:
                    continue
                start = time.perf_counter()
                samples[name].append(median(timers[name].events(timers[name].calls)))
                used[name] += time.perf_counter() - start
        details = {}
        for name, timer in timers.items():
            found = details[name] = Detail("events" if timer.graph is None else "graph")
            found.alone_ms, found.host_ms = timer.alone()
            found.kernels = kernels(timer.call)
            found.clock_mhz = meter.clock(timer.spans)
        for found in details.values():
            found.power_w = meter.power()
    return samples, details


def kernels(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds per call of the longest kernels, by name; empty if the profiler does not run."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            for _ in range(PROFILED_CALLS):
                call()
            torch.cuda.synchronize()
        events = seen.key_averages()
    except RuntimeError:
        return {}
    total: dict[str, float] = defaultdict(float)
    for event in events:
        spent = event.self_device_time_total / 1e3 / PROFILED_CALLS
        if spent > 0 and event.self_cpu_time_total == 0:
            total[event.key[:NAME]] += spent
    longest = sorted(total.items(), key=lambda item: -item[1])
    return {name: round(ms, 5) for name, ms in longest[:KERNELS]}
