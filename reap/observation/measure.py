"""How the experts of one layer are run so that the norm of every expert output comes out too.

`fused` hands the module's weights to `reap_kernels.moe_saliency`, which replaces the module's own
forward. `slot_by_slot` leaves that forward alone and adds K extra forwards, each with one slot per
token and a gate of one. That gives f(x) for any module that maps (hidden states, ids, gates) to a
sum: slower, and right for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import reap_kernels
from reap.errors import ReapError
from reap.model import compat
from reap.model.compat import Layout
from reap_kernels import reference
from reap_kernels.contract import make_call

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# How far, relative to the exact output, ours may be off beyond 1.2 times the module's own error.
SLACK = {torch.bfloat16: 1e-4, torch.float16: 1e-4, torch.float32: 1e-3}
# How far the sum of gate times expert output may be off the module's own output.
CONSISTENT = {torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float32: 1e-3}
PROBE_ELEMENTS = 2048  # of the output are compared, of tokens with at most PROBE_SLOTS slots
PROBE_SLOTS = 16

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden states, ids [T,K], gates [T,K]


class Measured(NamedTuple):
    out: Tensor  # the layer's output, shaped and typed as the module's own
    norms: Tensor  # ||f(x)||_2 [T, K] fp32
    peaks: Tensor  # max |f(x)| [T, K] fp32
    channel_sums: Tensor | None = None  # of w * h [2, E, I] fp32; None: not asked for, or unknown
    output_sums: Tensor | None = None  # of w * f(x) [2, E, H] fp32 or fp64; None: not asked for


def weight_names(layout: Layout) -> tuple[str, ...]:
    """Of a module's weights, then of its biases if it has any."""
    up = "gate_up_proj" if layout.gated else "up_proj"
    return (up, "down_proj", f"{up}_bias", "down_proj_bias") if layout.biased else (up, "down_proj")


def why_not_fused(
    names: tuple[str, ...], weights: list[Any], layout: Layout, dtype: torch.dtype
) -> str | None:
    """Why `moe_saliency` cannot stand in for a module with these weights, in a few words."""
    for name, weight in zip(names, weights, strict=True):
        if not isinstance(weight, Tensor) or weight.dtype not in FLOATS:
            return f"{name} is not a tensor of bfloat16, float16 or float32"
        if weight.dtype != dtype:
            return f"it is called with {dtype} and {name} is {weight.dtype}"
    return "it has a norm after each expert" if layout.post_norm else None


def fused(
    weights: list[Tensor],
    layout: Layout,
    hidden: Tensor,
    ids: Tensor,
    gates: Tensor,
    sum_weights: Tensor | None = None,  # [2,T,K] fp32
    **options: Any,
) -> Measured:
    """`moe_saliency` of weights that lie as `layout` says, with sums over slots where they have
    weights; `options` are activation, backend and so on."""
    up, down, *biases = weights
    gate_up_bias, down_bias = biases or (None, None)
    given = hidden, up, down, ids, gates
    options |= {
        "gate_up_bias": gate_up_bias,
        "down_bias": down_bias,
        "gated": layout.gated,
        "interleaved": layout.interleaved,
        "transposed": layout.transposed,
    }
    if sum_weights is None:
        return Measured(*reap_kernels.moe_saliency(*given, **options))
    return Measured(*reap_kernels.moe_saliency_sums(*given, sum_weights, **options))


def slot_by_slot(
    forward: Forward,
    hidden: Tensor,
    ids: Tensor,
    gates: Tensor,
    experts: int,
    out: Tensor | None = None,
    sum_weights: Tensor | None = None,  # [2,T,K] fp32
) -> Measured:
    """The module's own output, and norms from its outputs for one slot at a time with gate one.

    `out` is the output if it is known already. Nothing larger than that is held. Norms are of
    outputs rounded to the model dtype; an id >= `experts` has norm 0. ReapError when the gated
    outputs of the slots do not add up to the output.
    """
    if out is None:
        out = forward(hidden, ids, gates)
    one = torch.ones_like(gates[:, :1])
    norms = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
    peaks = torch.zeros_like(norms)
    total = torch.zeros_like(out.reshape(len(ids), -1), dtype=torch.float32)
    sums = None if sum_weights is None else new_sums(experts, total)
    for k in range(ids.shape[1]):
        y = forward(hidden, ids[:, k : k + 1], one).reshape(total.shape).float()
        total += gates[:, k : k + 1].float() * y
        y = torch.where(ids[:, k : k + 1] < experts, y, 0)
        norms[:, k] = torch.linalg.vector_norm(y, dim=1)
        peaks[:, k] = y.abs().amax(dim=1)
        if sums is not None and sum_weights is not None:
            add_rows(sums, ids[:, k], sum_weights[:, :, k], y)
    check_sum(total, out.reshape(total.shape))
    return Measured(out, norms, peaks, None, sums)


def new_sums(experts: int, like: Tensor) -> Tensor:
    """Sums of outputs [2,E,H] fp64, zero, on the device of rows [n,H] `like` these."""
    return like.new_zeros((2, experts, like.shape[1]), dtype=torch.float64)


def add_rows(sums: Tensor, ids: Tensor, weights: Tensor, rows: Tensor) -> None:
    """Add to sums [2,E,H] fp64 the rows [n,H] of the experts `ids` [n], times `weights` [2,n]. In
    one order: the same bits run to run. What weighs 0 may be anything."""
    experts = sums.shape[1]
    real = ids < experts
    ids, wide = torch.where(real, ids, 0).long(), rows.double()
    for total, weight in zip(sums, torch.where(real, weights, 0).double(), strict=True):
        addends = torch.where((weight == 0)[:, None], 0, weight[:, None] * wide)
        if sums.device.type == "cpu":
            total.index_add_(0, ids, addends)
        else:  # whose index_add_ takes rows as they come
            total += nn.functional.one_hot(ids, experts).T.double() @ addends


def check_sum(total: Tensor, out: Tensor) -> None:
    """ReapError when `total`, the sum of gate times expert output, is not `out`, both [n,H]."""
    scale = torch.linalg.vector_norm(out.float())
    error = torch.linalg.vector_norm(total - out.float())
    # A NaN is reported with its layer and expert by the statistics.
    if torch.isfinite(error) and error > CONSISTENT.get(out.dtype, 3e-2) * scale + 1e-6:
        raise ReapError(
            "the gated outputs of its experts do not add up to its output "
            f"(off by {error / scale:.1%})"
        )


def accurate(
    weights: list[Tensor],
    layout: Layout,
    forward: Forward,
    hidden: Tensor,
    ids: Tensor,
    gates: Tensor,
    **options: Any,
) -> bool:
    """Whether `fused` is as close to the exact output as the module's own forward, on a few tokens.

    This finds a module whose own forward does more than its flags say: computes in another dtype,
    say. Exact means computed in fp64 (fp32 for 16-bit models). Waits for the device once.
    """
    K, H = ids.shape[1], hidden.shape[-1]
    n = max(1, min(PROBE_SLOTS // K, len(ids), math.ceil(PROBE_ELEMENTS / H)))
    hidden, ids, gates = hidden[:n], ids[:n], gates[:n]
    exact = _exact(weights, layout, hidden, ids, gates, options["activation"])

    def size(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x)

    own = forward(hidden, ids, gates).to(exact.dtype)
    ours = fused(weights, layout, hidden, ids, gates, **options).out.to(exact.dtype)
    scale, error, our_error = torch.stack(
        [size(exact), size(own - exact), size(ours - exact)]
    ).tolist()
    return not math.isfinite(scale) or our_error <= 1.2 * error + SLACK[hidden.dtype] * scale


def _exact(
    weights: list[Tensor],
    layout: Layout,
    hidden: Tensor,
    ids: Tensor,
    gates: Tensor,
    activation: str,
) -> Tensor:
    """The layer's output [n,H] in a wider dtype. One slot at a time, since wide copies of several
    experts may not fit, and an expert is looked up on the device, so that nothing waits for it."""
    wide = torch.float64 if hidden.dtype == torch.float32 else torch.float32
    exact = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
    one = torch.zeros(1, 1, dtype=torch.int64, device=hidden.device)
    options: dict[str, Any] = {
        "activation": activation,
        "gated": layout.gated,
        "interleaved": layout.interleaved,
        "transposed": layout.transposed,
    }
    for t in range(len(ids)):
        x = hidden[t : t + 1].to(wide)
        for k in range(ids.shape[1]):
            expert = ids[t, k : k + 1]
            place = expert.clamp(0, len(weights[0]) - 1)
            up, down, *biases = (weight.index_select(0, place).to(wide) for weight in weights)
            call = make_call(x, up, down, one, one.to(wide), *biases, **options)
            y = gates[t, k] * reference.expert_output(x, 0, call)
            exact[t] += torch.where(expert < len(weights[0]), y, 0)[0]
    return exact


_EVERY_MODULES = frozenset(vars(nn.Module()))
_PLAIN = (int, float, str)


def state_of(module: nn.Module, weights: tuple[str, ...] = ()) -> tuple[Any, ...]:
    """The same for two modules of a class that differ in their parameters called `weights` alone,
    as the layers of a model do: numbers and texts by value, anything else by identity."""
    own = ((name, x) for name, x in vars(module).items() if name not in _EVERY_MODULES)
    tensors = chain(
        module.named_parameters(recurse=False, remove_duplicate=False),
        module.named_buffers(recurse=False, remove_duplicate=False),
    )
    return (
        type(module),
        *((name, type(x), x if x is None or isinstance(x, _PLAIN) else id(x)) for name, x in own),
        *((name, id(tensor)) for name, tensor in tensors if name not in weights),
        *((name, state_of(child)) for name, child in module.named_children()),
    )


def activation_of(module: nn.Module) -> str | None:
    """What the module applies between its projections, in `moe_saliency`'s words; None if unknown.

    Found by numbers, not by names: the module's own gate is run on a grid that reaches beyond any
    limit, and compared with every candidate. Limits and alphas are read off the module. In fp64,
    since below -3 two ways to compute an exact gelu in fp32 differ by more than any tolerance here.
    """
    numbers = {
        name: float(value)
        for name, value in vars(module).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    limits = {v for name, v in numbers.items() if "limit" in name and v > 0}
    alphas = {1.0} | {v for name, v in numbers.items() if "alpha" in name}
    edges = [0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0]
    edges += [limit * f for limit in limits if limit < 1e4 for f in (0.5, 0.99, 1.01, 3.0)]
    axis = torch.tensor(sorted({*edges, *(-edge for edge in edges)}), dtype=torch.float64)
    gate, up = torch.cartesian_prod(axis, axis).unbind(1)

    candidates = ["silu", "gelu", "gelu_tanh", "relu", "relu2"]
    layout = compat.layout(module)
    if layout.gated:
        candidates += [
            reap_kernels.swiglu_clamped(alpha, limit, offset)
            for limit in sorted(limits)
            for alpha in sorted(alphas)
            for offset in (0.0, 1.0)
        ]
    grid = gate
    if layout.gated:
        parts = (gate, up)
        grid = torch.stack(parts, 1).flatten() if layout.interleaved else torch.cat(parts)
    try:
        actual = compat.activation(module)(grid[None])[0]
    except Exception:  # code of the model that we know nothing about: then it is of no known kind
        return None
    if actual.shape != gate.shape:
        return None
    for candidate in candidates:
        expected = _expected(candidate, tuple(axis.tolist()), layout.gated)
        if torch.allclose(actual, expected, rtol=1e-5, atol=1e-5):
            return candidate
    return None


@lru_cache(maxsize=256)
def _expected(activation: str, axis: tuple[float, ...], gated: bool) -> Tensor:
    """`activation` at the points of the grid of `axis` [N] by the library: one expert with identity
    weights. The layers of a model share it."""
    points = torch.cartesian_prod(*[torch.tensor(axis, dtype=torch.float64)] * 2)  # gate, up
    x = points if gated else points[:, :1]
    eye = torch.eye(x.shape[1], dtype=x.dtype)[None]
    down = torch.ones(1, x.shape[1], 1, dtype=x.dtype)
    ids, gates = torch.zeros(len(x), 1, dtype=torch.int64), torch.ones(len(x), 1)
    options: dict[str, Any] = {"activation": activation, "gated": gated, "backend": "reference"}
    return reap_kernels.moe_saliency(x, eye, down, ids, gates, **options).out[:, 0]
