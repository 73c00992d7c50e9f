"""What keeping exact statistics costs, beside the forward of the layer that they are of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

import reap_kernels
from bench import gate, inputs, layer, peers
from bench.measure import TORCH, Settings, interleave, rows
from bench.row import Row
from bench.shapes import Shape
from reap.model.info import LayerInfo, ModelInfo
from reap.statistics.stats import Statistics

TOKENS = {"cpu": (64, 2048), "cuda": (1024, 16384)}


def run(settings: Settings) -> Iterator[Row]:
    settings = replace(
        settings, tokens=settings.tokens if settings.smoke else TOKENS[settings.device]
    )
    for dtype in settings.dtypes:
        for shape in settings.shapes:
            if shape.own:
                continue  # statistics see no weights: those of the same shape are the same
            fitted = layer.fit(shape, dtype, settings)
            if fitted is not None:
                yield from _shape(fitted, dtype, settings)


@torch.inference_mode()
def _shape(shape: Shape, dtype: str, settings: Settings) -> Iterator[Row]:
    weights = inputs.weights(shape, TORCH[dtype], settings.device)
    eager = peers.transformers_experts(**weights, implementation="eager")
    backends = layer.backends_here(settings, dtype)
    backends = [name for name in backends if settings.wants(f"reap:{name}")] or backends
    for T in settings.tokens:
        given = inputs.routed(shape, T, TORCH[dtype], settings.device) | weights
        calls = {f"layer {name}": layer.ours(name, given) for name in backends}
        calls["layer eager"] = layer.peer(eager, given)
        _, norms, peaks = reap_kernels.moe_saliency(**given, backend=backends[0])
        slots = (given["top_k_index"], given["top_k_weights"], norms, peaks)
        _check(_empty(shape), slots)
        for name, pairs in (("reap:update", False), ("reap:update+pairs", True)):
            stats = _empty(shape, pairs=pairs)
            calls[name] = partial(stats.update, "layer", *slots)
            calls[name]()
        # Statistics count their updates on the host, which a graph would replay without.
        samples = interleave(calls, None, settings, graphs=False)
        yield from rows("stats", (dtype, str(shape), T), samples)


def _empty(shape: Shape, *, pairs: bool = False) -> Statistics:
    info = ModelInfo("bench", shape.name, "", None, (LayerInfo("layer", shape.E, shape.K),))
    return Statistics(info, pairs=pairs)


def _check(stats: Statistics, slots: tuple[torch.Tensor, ...]) -> None:
    """Counts exactly, and the sums of gate times norm against fp64."""
    stats.update("layer", *slots)
    found = stats["layer"]
    ids, gates, norms = (tensor.reshape(-1).cpu() for tensor in slots[:3])
    weighted = torch.zeros(found.num_experts, dtype=torch.float64)
    weighted.index_add_(0, ids, gates.double() * norms.double())
    counts = torch.bincount(ids, minlength=found.num_experts)
    # Each product is rounded to fp32 before it is summed exactly.
    close = torch.allclose(found.weighted_sum, weighted, rtol=2**-23)
    if not torch.equal(found.count, counts) or not close:
        raise gate.WrongResult("Statistics.update: counts or weighted sums are off")
