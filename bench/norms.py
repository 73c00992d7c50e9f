"""What norms and peaks cost: the same kernels with and without them, in turn, many times.

One neighbour's burst must not land on one of the two, so the price is the median over pairs of
calls, not the ratio of two medians. On a GPU, where nobody else is, rounds in turn do; there the
price is `triton`'s, whose kernels can be compiled without norms and peaks.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from bench import gate, inputs, layer
from bench.measure import SAMPLE_SECONDS, TORCH, Samples, Settings, interleave, rows, seconds
from bench.row import Row
from bench.shapes import Shape
from reap_kernels import cpu, triton
from reap_kernels.contract import make_call
from reap_kernels.triton.signature import signature_of

ON, OFF = "reap:cpu", "cpu, norms off"
ON_GPU, OFF_GPU = "reap:triton", "triton, norms off"
PAIRS = 101


def run(settings: Settings) -> Iterator[Row]:
    """For the first shape: two rows per size, and the price in words."""
    on_gpu = settings.device == "cuda"
    if reason := (triton if on_gpu else cpu).available():
        settings.say(f"norms: skipped, {reason}")
        return
    for dtype in settings.dtypes:
        shape = layer.fit(settings.shapes[0], dtype, settings)
        if shape is not None:
            yield from (_layer_on_gpu if on_gpu else _layer)(shape, dtype, settings)


@torch.inference_mode()
def _layer_on_gpu(shape: Shape, dtype: str, settings: Settings) -> Iterator[Row]:
    weights = inputs.weights(shape, TORCH[dtype], settings.device)
    for T in settings.tokens:
        given = inputs.routed(shape, T, TORCH[dtype], settings.device) | weights
        without = without_norms(given)
        calls = {ON_GPU: layer.ours("triton", given), OFF_GPU: without}
        gate.check(ON_GPU, calls[ON_GPU](), given)
        gate.check(OFF_GPU, without(), given)
        samples = interleave(calls, dtype, settings)
        price = median(samples.ms[ON_GPU]) / median(samples.ms[OFF_GPU]) - 1
        settings.say(f"norms {dtype} {shape} T={T}: cost {price:+.2%}")
        yield from rows("norms", (dtype, str(shape), T), samples, flops=shape.flops(T))


def without_norms(given: dict[str, Any]) -> Callable[[], Tensor]:
    """The output alone, by `triton`'s kernels without norms and peaks."""
    from reap_kernels.triton import launch

    call = make_call(**given)
    key = "norms off", signature_of(call)
    config, reason = triton.choose(call)
    if config is None:
        raise ValueError(f"triton cannot run this layer: {reason}")
    return lambda: launch.run(call, config, key, norms=False).out


@torch.inference_mode()
def _layer(shape: Shape, dtype: str, settings: Settings) -> Iterator[Row]:
    weights = inputs.weights(shape, TORCH[dtype])
    for T in settings.tokens:
        given = inputs.routed(shape, T, TORCH[dtype]) | weights
        calls = {ON: layer.executed(given), OFF: layer.executed(given, norms=False)}
        gate.check(ON, calls[ON](), given)
        gate.check(OFF, calls[OFF]().out, given)
        yield from paired("norms", calls, (dtype, str(shape), T), shape.flops(T), settings)


def paired(
    suite: str,
    calls: dict[str, Callable[[], Any]],  # with what is priced, and without
    of: tuple[str, str, int],  # dtype, shape, T
    flops: int,
    settings: Settings,
) -> Iterator[Row]:
    """Both in turn, up to 101 times: their rows, and the price in words."""
    on, off = calls
    repeats = math.ceil(SAMPLE_SECONDS / seconds(calls[off], 1))
    samples = Samples({on: [], off: []}, [])
    until = time.perf_counter() + 4 * settings.seconds
    for pair in itertools.count():
        for name in (on, off) if pair % 2 else (off, on):
            samples.ms[name].append(1e3 * seconds(calls[name], repeats) / repeats)
        if pair + 1 == PAIRS or (pair >= 4 and time.perf_counter() > until):
            break
    ratios = [b / a for a, b in zip(samples.ms[on], samples.ms[off], strict=True)]
    low, _, high = (1 / q - 1 for q in quantiles(ratios, n=4))
    price = f"{1 / median(ratios) - 1:+.2%}, half of {len(ratios)} pairs {high:+.1%} to {low:+.1%}"
    settings.say(f"{suite} {of[0]} {of[1]} T={of[2]}: cost {price}")
    priced, without = rows(suite, of, samples, flops=flops)
    yield replace(priced, speedup_vs={off: median(ratios)})
    yield without
