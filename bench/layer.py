"""One MoE layer with its saliency, against the same layer without and against other observers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import reap_kernels
from bench import device, gate, inputs, memory, peers
from bench.measure import TORCH, Settings, interleave, rows
from bench.row import Row
from bench.shapes import BYTES, TINY, Shape
from reap_kernels import cpu, cuda, cuda_sm90, ops
from reap_kernels.contract import make_call

# An observer that runs every expert on every token is worth waiting for up to here [FLOP].
OBSERVER_FLOPS = 5e12
PEERS = ("eager", "grouped_mm", "hooks", "observer")
ON_GPU = ("bmm", "liger", "batched_mm", "deepgemm", "sonicmoe")
DETERMINISTIC = "+det"
OURS = tuple(f"reap:{backend.NAME}" for backend in ops.LADDER)
# One form of cuda_sm90's kernels, whatever csrc/cuda/sm90/forms.cuh would choose.
FORMS = tuple(f"reap:cuda_sm90+{form}" for form in ("cooperative", "pingpong", "swapped"))
IMPLS = (*OURS, *(f"{name}{DETERMINISTIC}" for name in OURS), *FORMS, *PEERS, *ON_GPU)


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
    modules = _modules(shape, weights, settings)
    backends = backends_here(settings, dtype)
    for T in settings.tokens:
        for routing in settings.routings:
            if routing == "even" and T * shape.K % shape.E:
                settings.say(f"layer: skips T={T} even, {T * shape.K} slots are not E times some")
                continue
            routed = inputs.routed(shape, T, TORCH[dtype], settings.device, routing)
            yield from _size(shape, dtype, routing, routed | weights, modules, backends, settings)
        if settings.device == "cuda":
            torch.cuda.empty_cache()


def _modules(
    shape: Shape, weights: dict[str, Tensor], settings: Settings
) -> dict[str, Callable[..., Any]]:
    """The peers by name; one that cannot be made is a line."""
    if shape.own:
        settings.say(f"layer: no peers for {shape.name}, they have another layout")
        return {}

    def transformers(name: str) -> Callable[[], nn.Module]:
        return lambda: peers.transformers_experts(**weights, implementation=name)

    makers: dict[str, Callable[[], nn.Module]] = {
        "eager": transformers("eager"),
        "grouped_mm": transformers("grouped_mm"),
        "hooks": lambda: peers.Hooks(*weights.values()),
        "observer": lambda: peers.Observer(*weights.values()),
    }
    if settings.device == "cuda":
        makers |= {name: transformers(name) for name in peers.others()}
        makers["liger"] = lambda: peers.Liger(*weights.values())
        makers["bmm"] = lambda: peers.Bmm(*weights.values())
    made: dict[str, Callable[..., Any]] = {}
    for name, make in makers.items():
        if settings.wants(name):
            try:
                made[name] = make()
            except ImportError as error:
                settings.say(f"layer: skips {name}, {_line(error)}")
    return made


def _size(
    shape: Shape,
    dtype: str,
    routing: str,
    given: dict[str, Any],
    modules: dict[str, Callable[..., Any]],
    backends: list[str],
    settings: Settings,
) -> Iterator[Row]:
    T = len(given["hidden_states"])
    calls = {f"reap:{name}": ours(name, given) for name in backends}
    if settings.device == "cuda":
        calls |= {
            f"reap:{name}{DETERMINISTIC}": ours(name, given, deterministic=True)
            for name in backends
        }
        if cuda_sm90.NAME in backends:
            calls |= {name: in_form(given, name.partition("+")[2]) for name in FORMS}
    for name, module in modules.items():
        if reason := _unbearable(name, shape, T, dtype, settings.device):
            settings.say(f"layer: skips {name} at T={T}, {reason}")
        else:
            calls[name] = peer(module, given)
    calls = {name: call for name, call in calls.items() if settings.wants(name)}
    for isa in settings.isas:
        calls[f"reap:cpu[{isa}]"] = executed(given, isa=isa)
    if T == min(settings.tokens) or settings.device == "cuda":
        for name in calls:
            if name not in ON_GPU:
                calls[name]()  # what libraries set up once is no layer's memory
    extra, checked = {}, gate.Gate(given)
    for name in list(calls):
        try:
            if name in ON_GPU:
                calls[name]()
            result, extra[name] = memory.peak_extra(calls[name], settings.device)
            if name != "bmm":
                checked.check(name, result)
        except Exception as error:
            if name not in ON_GPU or "CUDA error" in str(error):
                raise
            settings.say(f"layer: skips {name} at T={T}, {_line(error)}")
            del calls[name]
    samples = interleave(calls, dtype, settings)
    floor = None
    if settings.device == "cuda":
        floor = device.floor_ms(shape, T, dtype, torch.cuda.get_device_name())
    yield from rows(
        "layer",
        (dtype, str(shape), T),
        samples,
        flops=shape.flops(T),
        extra=extra,
        routing=routing,
        floor_ms=floor,
    )


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


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


def ours(backend: str, given: dict[str, Any], **options: Any) -> Callable[[], Any]:
    return lambda: reap_kernels.moe_saliency(**given, backend=backend, **options)


def executed(given: dict[str, Any], **options: Any) -> Callable[[], Any]:
    """The CPU kernels with one of `execute`'s options."""
    call = make_call(**given)
    return lambda: cpu.execute(call, **options)[0]


def in_form(given: dict[str, Any], form: str) -> Callable[[], Any]:
    """The kernels for Hopper in one of their forms."""
    call = make_call(**given)
    return lambda: cuda.launch(call, wgmma=True, form=form)


def peer(module: Callable[..., Any], given: dict[str, Any]) -> Callable[[], Any]:
    names = ("hidden_states", "top_k_index", "top_k_weights")
    return lambda: module(*(given[name] for name in names))


def _unbearable(name: str, shape: Shape, T: int, dtype: str, where: str) -> str | None:
    """Why a peer is not waited for, or has no room."""
    if name == "observer":
        if shape.flops(T) * shape.E / shape.K > OBSERVER_FLOPS:
            return f"it computes more than {OBSERVER_FLOPS:.0e} FLOP"
        needed = 2 * peers.Observer.bytes_needed(shape.E, T, shape.H)
    elif name == "batched_mm":  # a copy of the weights for every slot
        needed = 2 * T * shape.K * 3 * shape.H * shape.I * BYTES[dtype]
    elif name == "bmm" and T * shape.K < shape.E:
        return "there are fewer slots than experts"
    else:
        return None
    room = memory.available(where)
    return None if needed < room else f"it needs {needed / 1e9:.0f} GB of {room / 1e9:.0f}"
