"""The compiled extensions, the reason why one is missing, and how a call is handed to one."""

import shutil
from importlib import import_module
from struct import Struct
from types import ModuleType

import torch
from torch import Tensor

from reap_kernels.contract import Call, Saliency, Summed

DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
_BUILD = "in a checkout run `pip install -v --no-build-isolation -e .`, and read what it says"


def _load(name: str) -> ModuleType | ImportError:
    try:
        return import_module(f"reap_kernels.{name}")
    except ImportError as error:
        return error


_extensions = {name: _load(name) for name in ("_native", "_cuda")}


def missing(name: str = "_native") -> str | None:
    """Why that extension is not there, in one line; None if it is."""
    found = _extensions[name]
    if isinstance(found, ModuleType):
        return None
    if not isinstance(found, ModuleNotFoundError):
        return f"the extension {name} cannot be loaded ({found})"
    if name == "_native":
        return f"the C++ extension is not built: install a C++17 compiler and pybind11, {_BUILD}"
    if nvcc := shutil.which("nvcc"):
        return f"the CUDA extension is not built, although there is {nvcc}: {_BUILD}"
    return f"the CUDA extension is not built: install the CUDA toolkit (nvcc), {_BUILD}"


def module(name: str = "_native") -> ModuleType:
    """The extension; ImportError with the reason if it is missing."""
    found = _extensions[name]
    if not isinstance(found, ModuleType):
        raise ImportError(missing(name))
    return found


def plain(call: Call, *, wide: bool) -> Call:
    """The call with row-major hidden_states, ids and gates both contiguous and, if `wide`, int64
    and fp32; copies what is not yet like that. A `layer` holds addresses of these tensors."""
    x, ids, gates = call.hidden_states, call.top_k_index, call.top_k_weights
    rows = x if x.stride(1) == 1 else x.contiguous()
    numbers, factors = ids.contiguous(), gates.contiguous()
    if wide:
        numbers, factors = numbers.to(torch.int64), factors.to(torch.float32)
    if call.sum_weights is not None and not call.sum_weights.is_contiguous():
        call = call._replace(sum_weights=call.sum_weights.contiguous())
    if rows is x and numbers is ids and factors is gates:
        return call
    return call._replace(hidden_states=rows, top_k_index=numbers, top_k_weights=factors)


def empty(call: Call) -> Saliency | Summed:
    """Results of a call in fresh, contiguous memory."""
    x, slots = call.hidden_states, call.top_k_index.shape
    norms = torch.empty(slots, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    saliency = Saliency(out, norms, torch.empty_like(norms))
    if call.sum_weights is None:
        return saliency
    return Summed(*saliency, *(norms.new_empty((2, call.E, n)) for n in (call.I, call.H)))


# Of `layer`: sizes, options, addresses and strides; three parameters of the activation.
NUMBERS = Struct("=43q3d")


def layer(
    extension: ModuleType,
    call: Call,
    result: Saliency | Summed,
    *,
    norms: bool = True,
    threads: int = 0,
    wgmma: bool = False,
    form: int = 0,
    chip: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> bytes:
    """csrc/layer.h's Layer of a `plain` call, as csrc/binding.h reads it. Keeps no tensor alive."""
    x, ids, gates = call.hidden_states, call.top_k_index, call.top_k_weights
    up, (kind, *parameters) = call.gate_up_proj, call.activation
    rows = up.shape[2 if call.transposed else 1]
    return NUMBERS.pack(
        *ids.shape,
        up.shape[0],
        x.shape[1],
        rows // 2 if call.gated else rows,
        extension.dtypes[DTYPES[x.dtype]],
        extension.activations[kind],
        call.gated,
        call.interleaved,
        x.data_ptr(),
        x.stride(0),
        *_weights(up, call.gate_up_bias, call.transposed),
        *_weights(call.down_proj, call.down_bias, call.transposed),
        ids.data_ptr(),
        ids.dtype == torch.int64,
        gates.data_ptr(),
        extension.dtypes[DTYPES[gates.dtype]],
        result.out.data_ptr(),
        result.norms.data_ptr() if norms else 0,
        result.peaks.data_ptr() if norms else 0,
        *_sums(call, result),
        threads,
        call.deterministic,
        wgmma,
        form,
        *chip,
        *parameters,
    )


def _sums(call: Call, result: Saliency | Summed) -> tuple[int, int, int]:
    if call.sum_weights is None or not isinstance(result, Summed):
        return 0, 0, 0
    sums = result.channel_sums.data_ptr(), result.output_sums.data_ptr()
    return call.sum_weights.data_ptr(), *sums


def _weights(weight: Tensor, bias: Tensor | None, transposed: bool) -> tuple[int, ...]:
    shape, strides = weight.shape, weight.stride()
    rows, k = (2, 1) if transposed else (1, 2)
    return (
        weight.data_ptr(),
        strides[0],
        # The stride of a dimension of size 1 means nothing; contiguous is the fast case.
        strides[rows] if shape[rows] > 1 else 1,
        strides[k] if shape[k] > 1 else 1,
        *((0, 0, 0) if bias is None else (bias.data_ptr(), *bias.stride())),
    )
