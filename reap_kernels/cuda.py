"""The CUDA backend: csrc/cuda, for NVIDIA GPUs from sm_80 on.

Its kernels have been executed on the emulator of the test suite, an earlier state of them on an
H100: see CAVEAT. Raw addresses, strides and torch's current stream go in; there is no allocation
but torch's and no wait, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

import torch

from reap_kernels import gpu, native
from reap_kernels.contract import Call, Saliency, Summed

NAME = "cuda"
ASSERTS_IDS = True  # a negative id traps in the first kernel
CAVEAT = (
    "ran on one GPU, an H100 (2026-11, commit c35517e, right after one word was mended); "
    "what was changed since, and other chips, on an emulator only"
)
DTYPES = (torch.bfloat16, torch.float16)
MAX_EXPERTS = 1 << 12  # one block counts and scans them
MAX_SLOTS = 1 << 30  # positions are int32
MAX_SIZE = 1 << 30  # so are coordinates along H and I
MAX_BLOCKS = (1 << 31) - 1  # of a launch


class Chip(NamedTuple):
    device: int  # CUDA ordinal
    sm: int  # compute capability, 90 for 9.0
    processors: int  # streaming multiprocessors
    cache: int  # bytes of its L2 cache


def available() -> str | None:
    if reason := native.missing("_cuda"):
        return reason
    if torch.version.hip is not None:
        return "this torch is built for ROCm"
    if reason := gpu.missing():
        return reason
    try:
        native.module("_cuda").device_count()
    except RuntimeError as error:
        return (
            f"{error}: the driver may be older than the CUDA toolkit that built the extension: "
            "update it, or build with an older nvcc"
        )
    reasons = [_unfit(chip(index).sm) for index in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]


def unsupported(call: Call) -> str | None:
    x = call.hidden_states
    if x.device.type != "cuda":
        return f"tensors are on {x.device}, must be on a GPU"
    return unsupported_sizes(call) or _unfit(chip(x.device.index).sm)


def unsupported_sizes(call: Call) -> str | None:
    """What is missing on any chip."""
    if call.hidden_states.dtype not in DTYPES:
        dtype = str(call.hidden_states.dtype).removeprefix("torch.")
        return f"hidden_states has dtype {dtype}, must be bfloat16 or float16"
    if call.E > MAX_EXPERTS:
        return f"{call.E} experts, at most {MAX_EXPERTS}"
    slots = call.T * call.K
    if slots > MAX_SLOTS:
        return f"{slots} slots, at most {MAX_SLOTS}: pass fewer tokens at a time"
    width = max(call.H, call.R)
    if width > MAX_SIZE:
        return f"a projection has {width} rows or columns, must be at most {MAX_SIZE}"
    # Of the smallest tiles, 32 rows by 128 columns, and of 8192 sums that are zeroed.
    tiles = min(slots, slots // 32 + call.E) * (width // 128 + 1)
    if call.sum_weights is not None:  # 32 rows of the down projection, 64 inner columns
        tiles = max(tiles, call.E * (width // 32 + 1))
    if (blocks := tiles + call.T * (call.H + 8) // 8192 + 1) > MAX_BLOCKS:
        return (
            f"{blocks} blocks for {slots} slots, at most {MAX_BLOCKS}: pass fewer tokens at a time"
        )
    return None


def run(call: Call) -> Saliency | Summed:
    """RuntimeError with the CUDA error's name if a launch fails."""
    return launch(call, wgmma=False)


def launch(call: Call, *, wgmma: bool, form: str = "automatic") -> Saliency | Summed:
    """On the call's device and torch's current stream there, with either set of kernels. `form`:
    of csrc/layer.h's Form, for tests and benchmarks of those for Hopper."""
    device = call.hidden_states.device
    if torch.cuda.current_device() != device.index:  # seldom, and asking is cheaper than a context
        with torch.cuda.device(device):
            return launch(call, wgmma=wgmma, form=form)
    stream = torch.cuda.current_stream(device).cuda_stream
    extension = native.module("_cuda")
    return execute(extension, call, chip(device.index), stream, wgmma=wgmma, form=form)


def execute(
    extension: ModuleType,
    call: Call,
    chip: Chip,
    stream: int,
    *,
    wgmma: bool = False,
    form: str = "automatic",
) -> Saliency | Summed:
    """`launch` on any module with the functions of csrc/cuda/bindings.cpp."""
    call = native.plain(call, wide=False)
    result = native.empty(call)
    if call.T == 0:
        for empty in result:  # sums of nothing; the others have no elements
            empty.zero_()
        return result
    number = extension.forms[form]
    layer = native.layer(extension, call, result, wgmma=wgmma, form=number, chip=chip)
    size = extension.workspace_bytes(layer)
    workspace = torch.empty(size, dtype=torch.uint8, device=call.hidden_states.device)
    extension.run_layer(layer, workspace.data_ptr(), stream)
    return result


@functools.cache
def chip(device: int) -> Chip:
    found = torch.cuda.get_device_properties(device)
    sm = 10 * found.major + found.minor
    return Chip(device, sm, found.multi_processor_count, found.L2_cache_size)


def _unfit(sm: int) -> str | None:
    """Why no code in the extension runs on that chip."""
    built = native.module("_cuda").architectures
    if any(_runs(name, sm) for name in built.split()):
        return None
    return f"the GPU is an sm_{sm}, and the extension is built for {built}: set REAP_CUDA_ARCHS"


def _runs(name: str, sm: int) -> bool:
    """sm_80: machine code for 8.x from 8.0 on; sm_90a: for 9.0 alone; compute_90: for 9.0 on."""
    kind, _, number = name.partition("_")
    own = int(number.rstrip("af"))
    if not number.isdigit():
        return own == sm
    return own <= sm and (kind == "compute" or own // 10 == sm // 10)
