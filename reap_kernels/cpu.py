"""The native CPU backend: csrc/cpu, compiled once per instruction set and chosen at run time."""

import torch
from torch import Tensor

from reap_kernels import native
from reap_kernels.contract import Call, Saliency

NAME = "cpu"

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
# As in csrc/cpu/layer.h.
_SLAB, _GROUP, _KSTEPS, _BLOCK_TOKENS, _LINE = 96, 48, 256, 128, 64


def available() -> str | None:
    return native.missing()


def unsupported(call: Call) -> str | None:
    dtype, device = call.hidden_states.dtype, call.hidden_states.device
    if device.type != "cpu":
        return f"tensors are on {device}, not on the CPU"
    if dtype not in _DTYPES:
        return f"no kernels for {dtype}"
    if call.T * call.K >= 2**31:
        return f"{call.T * call.K} slots, at most {2**31 - 1} per call"
    return None


def run(call: Call) -> Saliency:
    """Always deterministic: the same bits at any number of threads (torch.get_num_threads())."""
    return execute(call)[0]


def execute(
    call: Call, *, isa: str | None = None, threads: int | None = None, norms: bool = True
) -> tuple[Saliency, int]:
    """`run` with an instruction set of `isas()` (None: the best), a number of threads, and with
    norms and peaks left out (they are then 0) to measure their price. Also returns the bytes that
    were allocated besides the results; MemoryError if they are not to be had, before any work."""
    module = native.module()
    x = call.hidden_states if call.hidden_states.stride(1) == 1 else call.hidden_states.contiguous()
    ids = call.top_k_index.to(torch.int64).contiguous()  # [T, K] int64
    gates = call.top_k_weights.to(torch.float32).contiguous()  # [T, K] fp32
    out = torch.empty(call.T, call.H, dtype=x.dtype)
    saliency = Saliency(out, torch.empty(call.T, call.K), torch.empty(call.T, call.K))

    layer = module.Layer()
    layer.T, layer.K, layer.E, layer.H, layer.I = call.T, call.K, call.E, call.H, call.I
    layer.dtype = getattr(module.Dtype, _DTYPES[x.dtype])
    layer.activation = getattr(module.Activation, call.activation.kind)
    _, layer.alpha, layer.limit, layer.offset = call.activation
    layer.gated, layer.interleaved = call.gated, call.interleaved
    layer.hidden, layer.hidden_stride = x.data_ptr(), x.stride(0)
    layer.gate_up = _weights(call.gate_up_proj, call.gate_up_bias, call.transposed)
    layer.down = _weights(call.down_proj, call.down_bias, call.transposed)
    layer.top_k_index, layer.top_k_weights = ids.data_ptr(), gates.data_ptr()
    layer.out = out.data_ptr()
    if norms:
        layer.norms, layer.peaks = saliency.norms.data_ptr(), saliency.peaks.data_ptr()
    else:
        saliency.norms.zero_()
        saliency.peaks.zero_()
    layer.threads = torch.get_num_threads() if threads is None else threads
    return saliency, module.run_layer(layer, isa)


def extra_bytes(call: Call, isa: str | None = None, threads: int | None = None) -> int:
    """The bytes that `execute` allocates besides its results, one allocation of

      S * I * size          the activated inner tensor, I rounded up to even, in the model dtype
      T * H * 4             sums of the layer output, if the model dtype is not fp32
      S * ceil(H/96) * 8    norms and peaks in parts
      S * 4 + E * 8 + ...   routing
      threads * scratch     packed tokens of a block (128 by H of four bytes, two bytes in bf16 on
                            avx512_bf16), a tile of weights (48 by 256) and two of sums (48 by 128)

    each rounded up to a cache line: nothing of size S*H, E*T or of the weights. Ids that are not
    int64, gates that are not fp32, either or hidden states whose rows are not adjacent are copied.
    """
    T, K, E, H, I = call.T, call.K, call.E, call.H, call.I  # noqa: E741
    S, dtype = T * K, call.hidden_states.dtype
    fp32 = dtype == torch.float32
    pairs = dtype == torch.bfloat16 and (isa or isas()[0]) == "avx512_bf16"
    slabs = -(-H // _SLAB)
    steps = -(-H // 2) if pairs else H if fp32 else max(H, I)
    scratch = 4 * (steps * _BLOCK_TOKENS + _GROUP * _KSTEPS + 2 * _GROUP * _BLOCK_TOKENS)
    pieces = (
        4 * S,  # order
        16 * (S // _BLOCK_TOKENS + min(S, E)),  # blocks
        8 * (E + 1),  # offsets
        8 * slabs,  # turns
        8 * S * slabs,  # partials
        0 if fp32 else 4 * T * H,  # sums
        scratch * (torch.get_num_threads() if threads is None else threads),
        S * (I + I % 2) * dtype.itemsize,  # inner
    )
    return sum(-(-piece // _LINE) * _LINE for piece in pieces) + 2 * _LINE


def isas() -> list[str]:
    """The instruction sets that this build and this processor have, best first."""
    return native.module().available_isas()


def _weights(weight: Tensor, bias: Tensor | None, transposed: bool) -> object:
    weights = native.module().Weights()
    weights.data = weight.data_ptr()
    rows, k = (2, 1) if transposed else (1, 2)
    weights.expert_stride = weight.stride(0)
    # The stride of a dimension of size 1 means nothing; adjacent is the fast case.
    weights.row_stride = weight.stride(rows) if weight.shape[rows] > 1 else 1
    weights.k_stride = weight.stride(k) if weight.shape[k] > 1 else 1
    if bias is not None:
        weights.bias = bias.data_ptr()
        weights.bias_expert_stride, weights.bias_row_stride = bias.stride()
    return weights
