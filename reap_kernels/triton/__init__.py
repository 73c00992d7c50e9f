"""The `triton` backend: NVIDIA GPUs from sm_80 and AMD CDNA GPUs; CPU tensors in the interpreter.

    routing     top-k ids -> slots sorted by expert, tiles
    gate_up     rows of x -> activated inner rows
    down        inner rows -> norms and peaks (partial), gated output
    slotsums    inner rows -> sums over an expert's slots, where they are asked for
    finish      partials -> norms and peaks, output in the model dtype
    statistics  norms, gates, ids -> exact sums per expert

Importing this package imports neither triton nor a kernel: `available` says why, if it cannot.
Negative ids on a GPU fail a device-side assertion in the first launch, as torch's own indexing
does: refusing them with a ValueError would make every layer wait for the device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from reap_kernels import gpu
from reap_kernels.contract import Call, Saliency, Summed, check_ids
from reap_kernels.triton import configs
from reap_kernels.triton.configs import Config
from reap_kernels.triton.signature import signature_of

NAME = "triton"
ASSERTS_IDS = True
CAVEAT = (
    "ran on one GPU, an H100 (2026-11, commit c35517e); what came since, and all other chips, were "
    "compiled, and executed in Triton's interpreter"
)
MIN_TRITON = (3, 4)
MAX_EXPERTS = 1 << 12  # the routing kernels scan them in one vector
MAX_SLOTS = 1 << 30  # positions are int32
MAX_CHOICES = 256  # that are remembered at a time: calls may have any number of tokens

_choices: dict[Any, tuple[Config | None, str | None]] = {}  # by signature


def available() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}): pip install triton"
    if _version(triton.__version__) < MIN_TRITON:
        least = ".".join(map(str, MIN_TRITON))
        return f"triton is {triton.__version__}, must be {least} or newer"
    if triton.knobs.runtime.interpret:
        if torch.cuda.is_available():
            return "TRITON_INTERPRET is set although there is a GPU: unset it"
        return None
    return gpu.missing()


def unsupported(call: Call) -> str | None:
    x = call.hidden_states
    if x.device.type != ("cpu" if _interpreting() else "cuda"):
        return f"tensors are on {x.device}, must be on a GPU"
    if x.dtype == torch.float64:
        return "hidden_states has dtype float64"
    if call.E > MAX_EXPERTS:
        return f"{call.E} experts, at most {MAX_EXPERTS}"
    if call.T * call.K > MAX_SLOTS:
        return f"{call.T * call.K} slots, at most {MAX_SLOTS}: pass fewer tokens at a time"
    return choose(call)[1]


def run(call: Call) -> Saliency | Summed:
    from reap_kernels.triton import launch

    if call.top_k_index.device.type == "cpu":
        check_ids(call.top_k_index)
    key = signature_of(call)
    config, reason = _choose(call, key)
    assert config is not None, reason
    device = call.hidden_states.device
    # Seldom another one, and asking is cheaper than a context.
    if device.type == "cpu" or torch.cuda.current_device() == device.index:
        return launch.run(call, config, key)
    with torch.cuda.device(device):
        return launch.run(call, config, key)


def choose(call: Call) -> tuple[Config | None, str | None]:
    """The call's config, or None and the reason."""
    return _choose(call, signature_of(call))


def _choose(call: Call, key: Any) -> tuple[Config | None, str | None]:
    """The same object for calls of one signature: launches made with it can be repeated."""
    if key not in _choices:
        if len(_choices) >= MAX_CHOICES:
            _choices.clear()
        _choices[key] = _shipped(call)
    return _choices[key]


def _shipped(call: Call) -> tuple[Config | None, str | None]:
    device = call.hidden_states.device
    kind = "interpreter" if device.type == "cpu" else configs.family(device)
    if kind is None:
        name = torch.cuda.get_device_name(device)
        return None, f"no tile config for {name}"
    limit, cache = configs.shared_limit(device, kind), configs.cache_size(device, kind)
    config = configs.choose(call, kind, limit, cache)
    return config, None if config else f"no tile config fits {limit} bytes of shared memory"


def _interpreting() -> bool:
    import triton

    return triton.knobs.runtime.interpret


@lru_cache
def _version(text: str) -> tuple[int, ...]:
    """ "3.9.0+git1" -> (3, 9)"""
    return tuple(int(part) for part in text.split(".")[:2])
