"""A GPU beside its rows: what its maker promises, and its clock and power while something ran."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

from bench.shapes import Shape


@dataclass(frozen=True)
class Gpu:
    """From the makers' data sheets."""

    flops: float  # dense 16-bit rate [FLOP/s]
    bandwidth: float  # of its memory [bytes/s]


# By a part of the name that torch has for them; first come the more special ones.
GPUS = {
    "A100-SXM4-80GB": Gpu(312e12, 2.04e12),
    "H100 80GB HBM3": Gpu(989e12, 3.35e12),
    "H200": Gpu(989e12, 4.8e12),
    "B200": Gpu(2250e12, 8.0e12),
    "MI300X": Gpu(1307e12, 5.3e12),
}


def known(name: str) -> Gpu | None:
    """The GPU that torch calls `name`; None for one that is not in the table."""
    return next((gpu for part, gpu in GPUS.items() if part in name), None)


def floor_ms(shape: Shape, T: int, dtype: str, name: str) -> float | None:
    """The time of the layer's slower roof: its FLOPs, or each byte that it must move once."""
    gpu = known(name)
    if gpu is None or dtype == "fp32":
        return None
    return 1e3 * max(shape.flops(T) / gpu.flops, shape.floor_bytes(T, dtype) / gpu.bandwidth)


QUERY = "clocks.sm,power.draw"
COMMAND = ("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits", "-i", "0")
PERIOD_MS = 50


@dataclass
class Meter:
    """What nvidia-smi says of the GPU, again and again. The clock is of the moment; the driver
    averages the power over a second."""

    readings: list[tuple[float, float, float]] = field(default_factory=list)  # s, MHz, W

    def clock(self, spans: list[tuple[float, float]]) -> float | None:
        """Median over the readings in the spans of time; over all if none is."""
        return self._median(1, spans)

    def power(self) -> float | None:
        return self._median(2, [])

    def _median(self, column: int, spans: list[tuple[float, float]]) -> float | None:
        inside = [
            reading
            for reading in self.readings
            if any(start <= reading[0] <= end for start, end in spans)
        ]
        values = [reading[column] for reading in inside or self.readings]
        return median(values) if values else None


@contextmanager
def metered() -> Iterator[Meter]:
    """A meter that runs inside the `with`; without an nvidia-smi it has no readings."""
    meter = Meter()
    if shutil.which(COMMAND[0]) is None:
        yield meter
        return
    ours, its = os.openpty()  # to a pipe it may write nothing until pages are full
    process = subprocess.Popen(
        [*COMMAND, "-lms", str(PERIOD_MS)],
        stdin=subprocess.DEVNULL,
        stdout=its,
        stderr=subprocess.DEVNULL,
    )
    os.close(its)
    thread = threading.Thread(target=_read, args=(ours, meter), daemon=True)
    thread.start()
    try:
        yield meter
    finally:
        process.kill()
        process.wait()
        thread.join(timeout=5)


def _read(terminal: int, meter: Meter) -> None:
    with os.fdopen(terminal, errors="replace") as lines, contextlib.suppress(OSError):
        for line in lines:  # OSError: the other end is closed
            try:
                clock, power = map(float, line.split(","))
            except ValueError:
                continue  # "[N/A]": this GPU does not tell
            meter.readings.append((time.perf_counter(), clock, power))
