"""The machine's two roofs: FMA peak per dtype and thread count, and read bandwidth."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import torch

from bench import roof
from bench.measure import Samples, Settings, rows
from bench.row import Row

SECONDS = 0.2


def run(settings: Settings) -> Iterator[Row]:
    if reason := roof.missing():
        settings.say(f"roof: skipped, {reason}")
        return
    threads = torch.get_num_threads()
    seconds = 0.01 if settings.smoke else SECONDS
    for dtype in settings.dtypes:
        for count in sorted({1, threads}):
            peaks = [roof.fma_peak(dtype, count, seconds) for _ in range(settings.rounds)]
            samples = Samples({"fma_peak": [1e3 * seconds] * len(peaks)}, peaks)
            flops = int(median(peaks) * seconds)
            yield from rows("roof", (dtype, f"{count} threads", 0), samples, flops=flops)
    yield from _bandwidth(settings, threads)


def _bandwidth(settings: Settings, threads: int) -> Iterator[Row]:
    """The row's time is that of one pass over its bytes, so bytes / time is the bandwidth."""
    data = torch.zeros(1 << 20 if settings.smoke else 1 << 30, dtype=torch.uint8).add_(1)
    rates = [roof.read_bandwidth(data, threads) for _ in range(settings.rounds)]
    samples = Samples({"read": [1e3 * data.nbytes / rate for rate in rates]}, [])
    yield from rows("roof", ("-", f"{data.nbytes} bytes, {threads} threads", 0), samples)
