"""One MoE layer with its saliency, against the same layer without and against other observers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import reap_kernels
from bench import gate, inputs, memory, peers
from bench.measure import TORCH, Settings, interleave, rows
from bench.row import Row
from bench.shapes import BYTES, Shape
from reap_kernels import cpu, ops
from reap_kernels.contract import Call, make_call

# An observer that runs every expert on every token is worth waiting for up to here [FLOP].
OBSERVER_FLOPS = 5e12
NORMS_OFF = "cpu, norms off"
PEERS = ("eager", "grouped_mm", "hooks", "observer")
IMPLS = (*(f"reap:{backend.NAME}" for backend in ops.LADDER), NORMS_OFF, *PEERS)
FLAGS = (True, False, False, False)  # gated, interleaved, transposed, deterministic


def run(settings: Settings) -> Iterator[Row]:
    for dtype in settings.dtypes:
        for shape in settings.shapes:
            fitted = fit(shape, dtype, settings)
            if fitted is not None:
                yield from _layer(fitted, dtype, settings)


def fit(shape: Shape, dtype: str, settings: Settings) -> Shape | None:
    """The layer as large as memory allows beside the slot tensors ([S,H]) that peers make."""
    slots = max(settings.tokens) * shape.K
    budget = int(0.85 * memory.available()) - 6 * slots * shape.H * BYTES[dtype]
    fitted = shape.fit(dtype, budget)
    if fitted is None:
        settings.say(f"layer: skips {shape} in {dtype}, {budget / 1e9:.1f} GB hold no K experts")
    elif fitted.of:
        gigabytes = shape.weight_bytes(dtype) / 1e9
        settings.say(f"layer: {shape} is {gigabytes:.1f} GB in {dtype}, so it runs as {fitted}")
    return fitted


@torch.inference_mode()
def _layer(shape: Shape, dtype: str, settings: Settings) -> Iterator[Row]:
    weights = inputs.weights(shape, TORCH[dtype])
    modules = {
        "eager": peers.transformers_experts(*weights.values(), "eager"),
        "grouped_mm": peers.transformers_experts(*weights.values(), "grouped_mm"),
        "hooks": peers.Hooks(*weights.values()),
        "observer": peers.Observer(*weights.values()),
    }
    backends = backends_here(settings)
    for T in settings.tokens:
        given = inputs.routed(shape, T, TORCH[dtype]) | weights
        calls = {f"reap:{name}": ours(name, given) for name in backends}
        if "cpu" in backends:
            calls[NORMS_OFF] = _without_norms(given)
        calls |= {
            name: peer(module, given)
            for name, module in modules.items()
            if name != "observer" or _observable(shape, T)
        }
        calls = {name: call for name, call in calls.items() if settings.wants(name)}
        if T == min(settings.tokens):
            for call in calls.values():
                call()  # what libraries set up once is no layer's memory
        extra = {}
        for name, call in calls.items():
            result, extra[name] = memory.peak_extra(call)
            gate.check(name, result, given)
            del result
        samples = interleave(calls, dtype, settings)
        size = (dtype, str(shape), T)
        yield from rows("layer", size, samples, flops=shape.flops(T), extra=extra)


def backends_here(settings: Settings) -> list[str]:
    """Those that run here; the reference, which is not made for speed, if nothing else does."""
    found: list[str] = []
    for name, reason in reap_kernels.backends().items():
        if reason is not None:
            settings.say(f"skips reap:{name}, {reason}")
        elif name != "reference" or settings.smoke or not found:
            found.append(name)
    return found


def ours(backend: str, given: dict[str, Any]) -> Callable[[], Any]:
    return lambda: reap_kernels.moe_saliency(**given, backend=backend)


def _without_norms(given: dict[str, Any]) -> Callable[[], Any]:
    """The same kernels with the saliency left out: what it costs is the ratio."""
    call = make_call(tuple(given[name] for name in Call._fields[:7]), given["activation"], FLAGS)
    return lambda: cpu.execute(call, norms=False)[0].out


def peer(module: torch.nn.Module, given: dict[str, Any]) -> Callable[[], Any]:
    names = ("hidden_states", "top_k_index", "top_k_weights")
    return lambda: module(*(given[name] for name in names))


def _observable(shape: Shape, T: int) -> bool:
    flops = shape.flops(T) * shape.E / shape.K
    fits = 2 * peers.Observer.bytes_needed(shape.E, T, shape.H) < memory.available()
    return flops <= OBSERVER_FLOPS and fits
