"""How everything is timed: implementations in turn, round by round, with the roof in between."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import torch

from bench import device, gputime, roof
from bench.row import Row, machine, versions
from bench.shapes import REAL, TINY, Shape

TORCH = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
# A sample is at least this long, so that the clock and the call into Python do not count.
SAMPLE_SECONDS = 0.02
ROOF_SECONDS = 0.05


@dataclass(frozen=True)
class Settings:
    """What a run covers. `seconds` is the time given to each implementation at each size, over
    `rounds` rounds or fewer, but at least three."""

    mode: str = "full"  # full, quick (minutes) or smoke (seconds, tiny shapes: no figure to quote)
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    shapes: tuple[Shape, ...] = tuple(REAL.values())
    tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    rounds: int = 9
    seconds: float = 10.0
    gigabytes: float = 4.0
    limit: str | None = None  # of `stream`
    impls: tuple[str, ...] = ()  # of `layer` and `calibrate`; none named: all
    isas: tuple[str, ...] = ()  # of `layer`, besides the best
    routings: tuple[str, ...] = ("uniform",)  # of `layer`: see inputs.ROUTINGS
    device: str = "cpu"  # cpu or cuda
    scratch: Path = Path("out/bench/scratch")
    llmcompressor: Path | None = None  # a python that has it
    official: Path | None = None  # a checkout with an environment in .venv
    say: Callable[[str], None] = field(default=print)

    @property
    def smoke(self) -> bool:
        return self.mode == "smoke"

    def wants(self, impl: str) -> bool:
        return not self.impls or impl in self.impls


PRESETS = {
    "full": Settings(),
    "quick": Settings(
        mode="quick",
        shapes=(REAL["qwen3-30b-a3b"],),
        tokens=(1, 64, 1024, 4096),
        rounds=5,
        seconds=4.0,
        gigabytes=2.0,
    ),
    "smoke": Settings(
        mode="smoke",
        shapes=(TINY,),
        tokens=(1, 40),
        rounds=1,
        seconds=0.05,
        gigabytes=0.002,
    ),
}


@dataclass
class Samples:
    """Milliseconds per call of each implementation, and the roof of each round [FLOP/s]."""

    ms: dict[str, list[float]]
    peaks: list[float]
    device: str = "cpu"
    details: dict[str, gputime.Detail] = field(default_factory=dict)  # of a GPU's implementations

    @property
    def peak(self) -> float | None:
        return median(self.peaks) if self.peaks else None


def interleave(
    impls: dict[str, Callable[[], object]],
    dtype: str | None,
    settings: Settings,
    *,
    wall: bool = False,
    graphs: bool = True,
) -> Samples:
    """Times the implementations in turn, so that a machine that slows down slows all of them down.

    Each has run once before. One that has used up its seconds after three rounds leaves the turn.
    On a GPU as in gputime.py, unless the `wall` clock is asked for; without `graphs` no call is
    replayed.
    """
    if settings.device == "cuda" and not wall:
        ms, details = gputime.interleave(impls, settings.rounds, settings.seconds, graphs=graphs)
        peak = _peak(dtype, "cuda") if dtype in TORCH else None
        return Samples(ms, [] if peak is None else [peak], "cuda", details)
    repeats = dict.fromkeys(impls, 1)
    samples = Samples({name: [] for name in impls}, [], settings.device)
    used = dict.fromkeys(impls, 0.0)
    names = list(impls)
    for done in range(settings.rounds):
        names.append(names.pop(0))  # nobody always follows the same neighbour
        if dtype in TORCH:
            peak = _peak(dtype, settings.device)
            samples.peaks += [] if peak is None else [peak]
        for name in names:
            if done >= 3 and used[name] > settings.seconds:
                continue
            elapsed = seconds(impls[name], repeats[name], settings.device)
            if done == 0 and elapsed < SAMPLE_SECONDS:
                repeats[name] = math.ceil(SAMPLE_SECONDS / elapsed)
                elapsed = seconds(impls[name], repeats[name], settings.device)
            used[name] += elapsed
            samples.ms[name].append(1e3 * elapsed / repeats[name])
    return samples


def _peak(dtype: str, where: str) -> float | None:
    if where == "cuda":
        gpu = device.known(torch.cuda.get_device_name())
        return gpu.flops if gpu is not None and dtype != "fp32" else None
    if roof.missing():
        return None
    return roof.fma_peak(dtype, torch.get_num_threads(), ROOF_SECONDS)


def seconds(call: Callable[[], object], repeats: int, device: str = "cpu") -> float:
    """Of `repeats` calls, from an idle device until it is idle again."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return time.perf_counter() - start


def rows(
    bench: str,
    size: tuple[str, str, int],  # dtype, shape, T
    samples: Samples,
    *,
    flops: int | None = None,
    extra: dict[str, int | None] | None = None,
    ours: str = "reap",
    routing: str | None = None,
    floor_ms: float | None = None,
) -> list[Row]:
    """One row per implementation; one whose name starts with `ours` is compared to the others."""
    dtype, shape, T = size
    peak = samples.peak
    medians = {name: median(ms) for name, ms in samples.ms.items()}
    peers = {name: ms for name, ms in medians.items() if not name.startswith(ours)}
    made = []
    for name, ms in samples.ms.items():
        rate = flops / medians[name] / 1e6 if flops else None  # FLOP / ms / 1e6 = GFLOP/s
        detail = samples.details.get(name, gputime.Detail())
        made.append(
            Row(
                bench=bench,
                impl=name,
                dtype=dtype,
                shape=shape,
                T=T,
                ms_median=medians[name],
                ms_p20=_percentile(ms, 20),
                ms_p80=_percentile(ms, 80),
                gflops=rate,
                fraction_of_peak=rate * 1e9 / peak if rate and peak else None,
                extra_bytes=(extra or {}).get(name),
                speedup_vs={}
                if name in peers
                else {peer: other / medians[name] for peer, other in peers.items()},
                routing=routing,
                floor_ms=floor_ms,
                method=detail.method,
                alone_ms=detail.alone_ms,
                host_ms=detail.host_ms,
                clock_mhz=detail.clock_mhz,
                power_w=detail.power_w,
                kernels=detail.kernels,
                machine=machine(samples.device),
                versions=versions(),
            )
        )
    return made


def _percentile(values: Sequence[float], percent: int) -> float:
    if len(values) == 1:
        return values[0]
    return quantiles(values, n=100, method="inclusive")[percent - 1]
