"""The compiled extensions, the reason why one is missing, and how a call is handed to one."""

import shutil
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from reap_kernels.contract import Call, Saliency

DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
_AGAIN = "then run `pip install -v --no-build-isolation -e .` again and read what it says"


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
        return f"the C++ extension is not built: install a C++17 compiler and pybind11, {_AGAIN}"
    if nvcc := shutil.which("nvcc"):
        return f"the CUDA extension is not built, although there is {nvcc}: {_AGAIN[5:]}"
    return f"the CUDA extension is not built: install the CUDA toolkit (nvcc), {_AGAIN}"


def module(name: str = "_native") -> ModuleType:
    """The extension; ImportError with the reason if it is missing."""
    found = _extensions[name]
    if not isinstance(found, ModuleType):
        raise ImportError(missing(name))
    return found


def plain(call: Call) -> Call:
    """The call with row-major hidden_states, ids int64 and gates fp32, both contiguous; copies what
    is not yet like that. A `layer` holds addresses of these tensors."""
    x = call.hidden_states
    return call._replace(
        hidden_states=x if x.stride(1) == 1 else x.contiguous(),
        top_k_index=call.top_k_index.to(torch.int64).contiguous(),
        top_k_weights=call.top_k_weights.to(torch.float32).contiguous(),
    )


def empty(call: Call) -> Saliency:
    """Results of a call in fresh, contiguous memory."""
    x = call.hidden_states
    norms = x.new_empty((call.T, call.K), dtype=torch.float32)
    return Saliency(x.new_empty((call.T, call.H)), norms, torch.empty_like(norms))


def layer(extension: ModuleType, call: Call, result: Saliency) -> Any:
    """csrc/layer.h's Layer of a `plain` call, without what only one engine takes. Keeps no tensor
    alive."""
    layer = extension.Layer()
    layer.T, layer.K, layer.E, layer.H, layer.I = call.T, call.K, call.E, call.H, call.I
    layer.dtype = getattr(extension.Dtype, DTYPES[call.hidden_states.dtype])
    layer.activation = getattr(extension.Activation, call.activation.kind)
    _, layer.alpha, layer.limit, layer.offset = call.activation
    layer.gated, layer.interleaved = call.gated, call.interleaved
    layer.hidden, layer.hidden_stride = call.hidden_states.data_ptr(), call.hidden_states.stride(0)
    layer.gate_up = _weights(extension, call.gate_up_proj, call.gate_up_bias, call.transposed)
    layer.down = _weights(extension, call.down_proj, call.down_bias, call.transposed)
    layer.top_k_index = call.top_k_index.data_ptr()
    layer.top_k_weights = call.top_k_weights.data_ptr()
    layer.out, layer.norms, layer.peaks = (tensor.data_ptr() for tensor in result)
    return layer


def _weights(extension: ModuleType, weight: Tensor, bias: Tensor | None, transposed: bool) -> Any:
    weights = extension.Weights()
    weights.data = weight.data_ptr()
    rows, k = (2, 1) if transposed else (1, 2)
    weights.expert_stride = weight.stride(0)
    # The stride of a dimension of size 1 means nothing; contiguous is the fast case.
    weights.row_stride = weight.stride(rows) if weight.shape[rows] > 1 else 1
    weights.k_stride = weight.stride(k) if weight.shape[k] > 1 else 1
    if bias is not None:
        weights.bias = bias.data_ptr()
        weights.bias_expert_stride, weights.bias_row_stride = bias.stride()
    return weights
