"""The CUDA backend's kernels for Hopper alone: csrc/cuda/sm90, with TMA, mbarriers and wgmma.

They have been executed on the emulator of the test suite, an earlier state of them on an H100 (see
CAVEAT), where they were the fastest: `auto` tries them first. What TMA cannot read (memory that is
not in multiples of 16 bytes) runs on the next backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reap_kernels import cuda, native
from reap_kernels.contract import Call, Saliency, Summed

NAME = "cuda_sm90"
ASSERTS_IDS = True
CAVEAT = (
    "ran on one GPU, an H100 (2026-11, commit c35517e, right after one word was mended), where it "
    "was the fastest; what was changed since ran on an emulator only"
)
SM = 90  # compute capability, times ten
UNIT = 8  # elements of 16 bits in the 16 bytes that TMA counts in
MAX_REACH = 1 << 39  # elements: strides of tensor maps are below 2^40 bytes
MAX_GATHERED = 1 << 35  # elements: rows of x are found by 32-bit offsets of 16 bytes


def available() -> str | None:
    # Of another GPU first: nothing that one could install or build would help.
    if torch.version.cuda is not None and torch.cuda.is_available():
        chips = {cuda.chip(index).sm for index in range(torch.cuda.device_count())}
        if chips and SM not in chips:
            return _other_chip(*chips)
    if reason := cuda.available():
        return reason
    built = native.module("_cuda").architectures
    return None if "sm_90a" in built.split() else f"the extension is built for {built}, not sm_90a"


def unsupported(call: Call) -> str | None:
    if reason := cuda.unsupported(call):
        return reason
    sm = cuda.chip(call.hidden_states.device.index).sm
    return unsupported_layout(call) if sm == SM else _other_chip(sm)


def _other_chip(*sms: int) -> str:
    names = " and ".join(f"sm_{sm}" for sm in sorted(sms))
    return f"the GPU is an {names}, must be an sm_{SM}"


def run(call: Call) -> Saliency | Summed:
    """RuntimeError with the CUDA error's name if a launch fails."""
    return cuda.launch(call, wgmma=True)


def unsupported_layout(call: Call) -> str | None:
    """What TMA cannot read."""
    if call.H % UNIT:
        return f"hidden size {call.H}, must be a multiple of {UNIT}"
    x, (rows, k) = call.hidden_states, (2, 1) if call.transposed else (1, 2)
    if x.stride(1) == 1 and (reason := _unaligned("hidden_states", x, 1)):
        return reason
    if call.T * x.stride(0) >= MAX_GATHERED:
        return f"hidden_states has strides {list(x.stride())}, must reach less than 64 GB"
    halves = call.gated and not call.interleaved
    if halves and _contiguous(call.gate_up_proj, k, rows) == rows and call.I % UNIT:
        return (
            f"inner size {call.I}, must be a multiple of {UNIT} where gate and up are "
            "concatenated along the contiguous dimension"
        )
    return _unaligned("gate_up_proj", call.gate_up_proj, k, rows) or _unaligned(
        "down_proj", call.down_proj, k, rows
    )


def _contiguous(tensor: Tensor, *dims: int) -> int | None:
    """The first of the dimensions that is contiguous, as csrc/cuda/sm90 picks it."""
    return next((d for d in dims if tensor.stride(d) == 1 or tensor.shape[d] == 1), None)


def _unaligned(name: str, tensor: Tensor, *dims: int) -> str | None:
    contiguous = _contiguous(tensor, *dims)
    others = [d for d in range(tensor.dim()) if d != contiguous and tensor.shape[d] > 1]
    if contiguous is None or any(tensor.stride(d) % UNIT or not tensor.stride(d) for d in others):
        return (
            f"{name} has strides {list(tensor.stride())}, must be contiguous along rows or columns "
            f"and have multiples of {UNIT} elsewhere"
        )
    others.sort(key=tensor.stride)
    filled = tensor.shape[contiguous]
    for d in others:
        if tensor.stride(d) < filled:
            return f"{name} has strides {list(tensor.stride())}, must not overlap"
        filled = tensor.stride(d) * tensor.shape[d]
    if filled >= MAX_REACH:
        return f"{name} has strides {list(tensor.stride())}, must reach less than 2^40 bytes"
    if tensor.data_ptr() % 16:
        return f"{name} starts at {tensor.data_ptr():#x}, must be a multiple of 16"
    return None
