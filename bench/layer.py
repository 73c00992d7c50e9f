"""One MoE layer with its saliency, against the same layer without and against other observers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import reap_kernels
from bench import gate, inputs, memory, peers
from bench.measure import TORCH, Settings, interleave, rows
from bench.row import Row
from bench.shapes import BYTES, TINY, Shape
from reap_kernels import cpu, ops
from reap_kernels.contract import make_call

# An observer that runs every expert on every token is worth waiting for up to here [FLOP].
OBSERVER_FLOPS = 5e12
PEERS = ("eager", "grouped_mm", "hooks", "observer")
IMPLS = (*(f"reap:{backend.NAME}" for backend in ops.LADDER), *PEERS)


def run(settings: Settings) -> Iterator[Row]:
    for dtype in settings.dtypes:
        for shape in settings.shapes:
            fitted = fit(shape, dtype, settings)
            if fitted is not None:
                yield from _layer(fitted, dtype, settings)


def fit(shape: Shape, dtype: str, settings: Settings) -> Shape | None:
    """The layer as large as memory allows beside the slot tensors ([S,H]) that peers make."""
    slots = max(settings.tokens) * shape.K
    budget = int(0.85 * memory.available(settings.device)) - 6 * slots * shape.H * BYTES[dtype]
    fitted = shape.fit(dtype, budget)
    if fitted is None:
        settings.say(f"layer: skips {shape} in {dtype}, {budget / 1e9:.1f} GB hold no K experts")
    elif fitted.of:
        gigabytes = shape.weight_bytes(dtype) / 1e9
        settings.say(f"layer: {shape} is {gigabytes:.1f} GB in {dtype}, so it runs as {fitted}")
    return fitted


@torch.inference_mode()
def _layer(shape: Shape, dtype: str, settings: Settings) -> Iterator[Row]:
    weights = inputs.weights(shape, TORCH[dtype], settings.device)
    modules = {
        "eager": peers.transformers_experts(**weights, implementation="eager"),
        "grouped_mm": peers.transformers_experts(**weights, implementation="grouped_mm"),
        "hooks": peers.Hooks(*weights.values()),
        "observer": peers.Observer(*weights.values()),
    }
    backends = backends_here(settings, dtype)
    for T in settings.tokens:
        given = inputs.routed(shape, T, TORCH[dtype], settings.device) | weights
        calls = {f"reap:{name}": ours(name, given) for name in backends}
        calls |= {
            name: peer(module, given)
            for name, module in modules.items()
            if name != "observer" or _observable(shape, T, settings.device)
        }
        calls = {name: call for name, call in calls.items() if settings.wants(name)}
        for isa in settings.isas:
            calls[f"reap:cpu[{isa}]"] = executed(given, isa=isa)
        if T == min(settings.tokens):
            for call in calls.values():
                call()  # what libraries set up once is no layer's memory
        extra = {}
        for name, call in calls.items():
            result, extra[name] = memory.peak_extra(call, settings.device)
            gate.check(name, result, given)
            del result
        samples = interleave(calls, dtype, settings)
        size = (dtype, str(shape), T)
        yield from rows("layer", size, samples, flops=shape.flops(T), extra=extra)


def backends_here(settings: Settings, dtype: str) -> list[str]:
    """Those that run such layers here; the reference, which is not made for speed, if nothing else
    does."""
    where = (TORCH[dtype], settings.device)
    probe = make_call(**inputs.weights(TINY, *where), **inputs.routed(TINY, 1, *where))
    found: list[str] = []
    for backend in ops.LADDER:
        reason = backend.available() or backend.unsupported(probe)
        if reason is not None:
            settings.say(f"skips reap:{backend.NAME}, {reason}")
        elif backend.NAME != "reference" or settings.smoke or not found:
            found.append(backend.NAME)
    return found


def ours(backend: str, given: dict[str, Any]) -> Callable[[], Any]:
    return lambda: reap_kernels.moe_saliency(**given, backend=backend)


def executed(given: dict[str, Any], **options: Any) -> Callable[[], Any]:
    """The CPU kernels with one of `execute`'s options."""
    call = make_call(**given)
    return lambda: cpu.execute(call, **options)[0]


def peer(module: torch.nn.Module, given: dict[str, Any]) -> Callable[[], Any]:
    names = ("hidden_states", "top_k_index", "top_k_weights")
    return lambda: module(*(given[name] for name in names))


def _observable(shape: Shape, T: int, device: str) -> bool:
    flops = shape.flops(T) * shape.E / shape.K
    fits = 2 * peers.Observer.bytes_needed(shape.E, T, shape.H) < memory.available(device)
    return flops <= OBSERVER_FLOPS and fits
