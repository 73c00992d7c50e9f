"""What norms and peaks cost: the same kernels with and without them, in turn, many times.

One neighbour's burst must not land on one of the two, so the price is the median over pairs of
calls, not the ratio of two medians.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from statistics import median, quantiles

import torch

from bench import gate, inputs, layer
from bench.measure import SAMPLE_SECONDS, TORCH, Samples, Settings, rows, seconds
from bench.row import Row
from bench.shapes import Shape
from reap_kernels import cpu

ON, OFF = "reap:cpu", "cpu, norms off"
PAIRS = 101
NOT_ON_A_GPU = (
    "no backend for GPUs can leave norms and peaks out; the times of their kernels, and of `bmm`, "
    "bound the price"
)


def run(settings: Settings) -> Iterator[Row]:
    """For the first shape: two rows per size, and the price in words."""
    if settings.device == "cuda":
        settings.say(f"norms: skipped, {NOT_ON_A_GPU}")
        return
    if reason := cpu.available():
        settings.say(f"norms: skipped, {reason}")
        return
    for dtype in settings.dtypes:
        shape = layer.fit(settings.shapes[0], dtype, settings)
        if shape is not None:
            yield from _layer(shape, dtype, settings)


@torch.inference_mode()
def _layer(shape: Shape, dtype: str, settings: Settings) -> Iterator[Row]:
    weights = inputs.weights(shape, TORCH[dtype])
    for T in settings.tokens:
        given = inputs.routed(shape, T, TORCH[dtype]) | weights
        calls = {ON: layer.executed(given), OFF: layer.executed(given, norms=False)}
        gate.check(ON, calls[ON](), given)
        gate.check(OFF, calls[OFF]().out, given)
        repeats = math.ceil(SAMPLE_SECONDS / seconds(calls[OFF], 1))
        samples = Samples({ON: [], OFF: []}, [])
        until = time.perf_counter() + 4 * settings.seconds
        for pair in itertools.count():
            for name in (ON, OFF) if pair % 2 else (OFF, ON):
                samples.ms[name].append(1e3 * seconds(calls[name], repeats) / repeats)
            if pair + 1 == PAIRS or (pair >= 4 and time.perf_counter() > until):
                break
        ratios = [off / on for on, off in zip(samples.ms[ON], samples.ms[OFF], strict=True)]
        low, _, high = (1 / q - 1 for q in quantiles(ratios, n=4))
        price = (
            f"{1 / median(ratios) - 1:+.2%}, half of {len(ratios)} pairs {high:+.1%} to {low:+.1%}"
        )
        settings.say(f"norms {dtype} {shape} T={T}: cost {price}")
        with_norms, without = rows("norms", (dtype, str(shape), T), samples, flops=shape.flops(T))
        yield replace(with_norms, speedup_vs={OFF: median(ratios)})
        yield without
