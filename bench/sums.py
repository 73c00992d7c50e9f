"""What sums of inner rows and of outputs per expert cost: the same layer with and without them, in
turn, as `norms` does it; on a GPU in rounds, by the backend that `auto` takes."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

import torch

import reap_kernels
from bench import gate, inputs, layer, norms
from bench.measure import TORCH, Settings, interleave, rows
from bench.row import Row
from bench.shapes import Shape
from reap_kernels import Saliency


def run(settings: Settings) -> Iterator[Row]:
    """For the first shape: two rows per size, and the price in words."""
    usable = [name for name, reason in reap_kernels.backends().items() if reason is None]
    backend = usable[0]
    if backend == "reference":
        settings.say("sums: skipped, no backend has kernels here")
        return
    for dtype in settings.dtypes:
        shape = layer.fit(settings.shapes[0], dtype, settings)
        if shape is not None:
            yield from _layer(backend, shape, dtype, settings)


@torch.inference_mode()
def _layer(backend: str, shape: Shape, dtype: str, settings: Settings) -> Iterator[Row]:
    on, off = f"reap:{backend} with sums", f"reap:{backend}"
    weights = inputs.weights(shape, TORCH[dtype], settings.device)
    for T in settings.tokens:
        given = inputs.routed(shape, T, TORCH[dtype], settings.device) | weights
        calls = {on: summed(backend, given), off: layer.ours(backend, given)}
        gate.check(on, Saliency(*calls[on]()[:3]), given)
        gate.check(off, calls[off](), given)
        of, flops = (dtype, str(shape), T), shape.flops(T)
        if settings.device == "cpu":
            yield from norms.paired("sums", calls, of, flops, settings)
            continue
        samples = interleave(calls, dtype, settings)
        price = median(samples.ms[on]) / median(samples.ms[off]) - 1
        settings.say(f"sums {dtype} {shape} T={T}: cost {price:+.2%}")
        yield from rows("sums", of, samples, flops=flops)


def summed(backend: str, given: dict[str, Any]) -> Any:
    gates = given["top_k_weights"].float()
    weights = torch.stack([torch.ones_like(gates), gates])
    return lambda: reap_kernels.moe_saliency_sums(**given, sum_weights=weights, backend=backend)
