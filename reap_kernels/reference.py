"""The specification: a plain loop over experts that every other backend is tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from reap_kernels.activations import Activation
from reap_kernels.contract import Call, Saliency, Summed

NAME = "reference"


def available() -> str | None:
    return None


def unsupported(call: Call) -> str | None:
    return None


def run(call: Call) -> Saliency | Summed:
    """Sums, bias, activation, norm, peak and gate are fp32 (fp64 for an fp64 model); the inner
    tensor and the output are rounded to the model dtype once each. Deterministic on every device:
    an expert sees a token once, so no two additions of one step meet in a cell."""
    x, ids, gates = call.hidden_states, call.top_k_index, call.top_k_weights
    wide = call.accumulator
    out = torch.zeros(x.shape, dtype=wide, device=x.device)  # [T, H]
    norms = torch.zeros(ids.shape, dtype=wide, device=x.device)  # [T, K]
    peaks = torch.zeros_like(norms)  # [T, K]
    sums = [torch.zeros(2, call.E, n, dtype=wide, device=x.device) for n in (call.I, call.H)]

    for expert in ids[ids < call.E].unique().tolist():
        chosen = ids == expert  # [T, K]
        token = chosen.any(dim=1).nonzero().squeeze(1)  # row of this expert -> token [n]
        slots = chosen[token]  # [n, K]

        inner = inner_rows(x[token], expert, call)  # [n, I]
        y = linear(inner, call.down_proj, call.down_bias, expert, call)  # [n, H]
        norm = torch.linalg.vector_norm(y, dim=1, keepdim=True)
        peak = y.abs().amax(dim=1, keepdim=True)
        norms[token] = torch.where(slots, norm, norms[token])
        peaks[token] = torch.where(slots, peak, peaks[token])

        gate = torch.where(slots, gates[token].to(wide), 0).sum(dim=1, keepdim=True)  # [n, 1]
        out[token] += gate * y
        if call.sum_weights is not None:
            weights = torch.where(slots, call.sum_weights[:, token], 0).sum(dim=2)  # [2, n]
            for total, rows in zip(sums, (inner, y), strict=True):
                total[:, expert] = weighted_sums(weights, rows).to(wide)

    saliency = Saliency(out.to(x.dtype), norms, peaks)
    return saliency if call.sum_weights is None else Summed(*saliency, *sums)


def expert_output(x: Tensor, expert: int, call: Call) -> Tensor:
    """f(x) of one expert, [n, H] model dtype -> [n, H] accumulator dtype."""
    inner = inner_rows(x, expert, call)
    return linear(inner, call.down_proj, call.down_bias, expert, call)


def inner_rows(x: Tensor, expert: int, call: Call) -> Tensor:
    """What the down projection sees, [n, H] -> [n, I] model dtype."""
    projected = linear(x, call.gate_up_proj, call.gate_up_bias, expert, call)
    return activate(projected, call).to(x.dtype)


def weighted_sums(weights: Tensor, rows: Tensor) -> Tensor:
    """[2, n] and [n, width] -> [2, width] fp64; what weighs 0 may be anything."""
    wide = rows.double()
    return torch.stack(
        [w.double() @ torch.where((w != 0)[:, None], wide, 0) for w in weights.unbind(0)]
    )


def linear(x: Tensor, weights: Tensor, biases: Tensor | None, expert: int, call: Call) -> Tensor:
    """x W^T + b of one expert, [n, in] model dtype -> [n, out] accumulator dtype."""
    weight = weights[expert] if call.transposed else weights[expert].T  # [in, out]
    y = x.to(call.accumulator) @ weight.to(call.accumulator)
    return y if biases is None else y + biases[expert]


def activate(projected: Tensor, call: Call) -> Tensor:
    """[n, 2I] -> [n, I] if gated, else [n, I] -> [n, I]; accumulator dtype."""
    if not call.gated:
        return elementwise(projected, call.activation)
    if call.interleaved:
        gate, up = projected[:, 0::2], projected[:, 1::2]
    else:
        gate, up = projected.chunk(2, dim=1)
    if call.activation.kind != "swiglu_clamped":
        return elementwise(gate, call.activation) * up
    _, alpha, limit, offset = call.activation
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + offset)


def elementwise(x: Tensor, activation: Activation) -> Tensor:
    if activation.kind == "silu":
        return F.silu(x)
    if activation.kind == "gelu":
        return F.gelu(x)
    if activation.kind == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation.kind == "relu":
        return F.relu(x)
    if activation.kind == "relu2":
        return F.relu(x).square()
    raise AssertionError(f"unreachable: {activation}")
