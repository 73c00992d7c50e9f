"""The op: checks, the ladder of backends, and its registration with torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from reap_kernels import cpu, cuda, cuda_sm90, reference, triton
from reap_kernels.contract import (
    FLAGS,
    TENSORS,
    Backend,
    Call,
    Saliency,
    Summed,
    check_ids,
    make_call,
)

# "auto" takes the first that is available and supports the call; a new backend is one entry here.
# On an sm_90 that is the order of their times on an H100: `cuda_sm90`, which runs nowhere else, was
# the fastest at every size but one token. The calls that it leaves (fp32, unaligned memory) and
# other chips have not been timed: there `triton` comes first, because its tiles are chosen per chip
# and those of `cuda` are not, and because it was the faster of the two at many tokens.
LADDER: tuple[Backend, ...] = (cpu, cuda_sm90, triton, cuda, reference)


def backends() -> dict[str, str | None]:
    """Every backend by name, in the order that "auto" tries them: None if usable on this machine,
    otherwise the reason why not, in one line."""
    return {backend.NAME: backend.available() for backend in LADDER}


def moe_saliency(
    hidden_states: Tensor,  # [T, H] bf16, fp16 or fp32: the model dtype (fp64 on `reference`)
    gate_up_proj: Tensor,  # [E, 2I, H] ([E, I, H] if not gated) model dtype
    down_proj: Tensor,  # [E, H, I] model dtype
    top_k_index: Tensor,  # expert of each slot, >= E for none [T, K] int32 or int64
    top_k_weights: Tensor,  # gate of each slot [T, K] bf16, fp16 or fp32
    *,
    activation: str = "silu",
    gate_up_bias: Tensor | None = None,  # [E, 2I] ([E, I] if not gated) model dtype
    down_bias: Tensor | None = None,  # [E, H] model dtype
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    backend: str = "auto",
    deterministic: bool = False,
) -> Saliency:
    """The output of a mixture-of-experts layer, and the norm of every expert output in it.

    out = sum_k gate_k * f_k(x) with f(x) = down(act(gate(x)) * up(x)); norms = ||f_k(x)||_2 and
    peaks = max |f_k(x)| are taken before the gate and before rounding: with the gates they make the
    saliency of arXiv 2510.13999, eq. 9. No tensor of the size of all expert outputs is made.

    activation   silu, gelu (erf), gelu_tanh, relu, relu2 (relu(x)^2) or `swiglu_clamped(...)`
    gated        False: gate_up_proj is up_proj alone and f(x) = down(act(up(x)))
    interleaved  gate and up alternate along 2I: g0, u0, g1, u1, ...; otherwise all g, then all u
    transposed   gate_up_proj is [E, H, 2I] and down_proj [E, I, H]
    backend      "auto", or one of `backends()`: that one runs the call or ValueError says why not
    deterministic  the same bits in `out` run to run; norms and peaks always have that

    Any strides do. A slot whose id is >= E adds nothing and has norm and peak 0. Returns
    Saliency(out [T, H] model dtype, norms [T, K] fp32, peaks [T, K] fp32) in fresh memory.
    Raises ValueError that names the argument, what it was and what it must be, before any work;
    only an id below 0 in GPU memory, which the host cannot see without waiting for the device, is a
    device-side assertion instead where `triton` runs, and a trap where `cuda` does. Where memory
    runs out, torch.OutOfMemoryError says so in one line; the next call may have fewer tokens.
    There is no backward: inputs that require grad need torch.no_grad() or torch.inference_mode().
    """
    tensors = (
        hidden_states,
        gate_up_proj,
        down_proj,
        top_k_index,
        top_k_weights,
        gate_up_bias,
        down_bias,
    )
    flags = (gated, interleaved, transposed, deterministic)
    _check_arguments((*tensors, None), flags, activation, backend)
    return Saliency(*_OP(*tensors, activation, *flags, backend))


def moe_saliency_sums(
    hidden_states: Tensor,  # [T, H] model dtype
    gate_up_proj: Tensor,
    down_proj: Tensor,
    top_k_index: Tensor,  # [T, K]
    top_k_weights: Tensor,  # [T, K]
    sum_weights: Tensor,  # w of each slot in either sum [2, T, K] fp32 (fp64 for an fp64 model)
    *,
    activation: str = "silu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    backend: str = "auto",
    deterministic: bool = False,
) -> Summed:
    """`moe_saliency`, of which all arguments and errors are, and per expert two weighted sums.

    channel_sums[i, e] = sum of w_i * h and output_sums[i, e] = sum of w_i * f(x), over the slots of
    expert e, with h = act(gate(x)) * up(x) rounded to the model dtype, as the down projection sees
    it, and f(x) as its norm does. With w of 1 and of the gate they are means and gated means times
    their number. A slot of weight 0 is left out, whatever is in it. Nothing of the size of all
    inner rows is kept for them beyond what the layer itself needs, nothing of all outputs is made.

    Sums are fp32 over the at most 160 rows of a block, fp64 over blocks in a fixed order, rounded
    to fp32: the same bits run to run on every backend, and off by at most 2^-24 times (n + 1) the
    sum of |w h|, of n = min(rows, 160) rows; output_sums by that beside the error of f(x) itself.
    """
    tensors = (
        hidden_states,
        gate_up_proj,
        down_proj,
        top_k_index,
        top_k_weights,
        gate_up_bias,
        down_bias,
        sum_weights,
    )
    flags = (gated, interleaved, transposed, deterministic)
    _check_arguments(tensors, flags, activation, backend)
    if sum_weights is None:
        raise ValueError("sum_weights is a NoneType, must be a torch.Tensor")
    return Summed(*_OP_SUMS(*tensors, activation, *flags, backend))


def _check_arguments(
    tensors: tuple[Tensor | None, ...], flags: tuple[bool, ...], activation: str, backend: str
) -> None:
    """What torch would reject in its own words, or not at all, before the op itself is reached."""
    for name, tensor in zip(TENSORS, tensors, strict=True):
        if not isinstance(tensor, Tensor) and not (tensor is None and name in _OPTIONAL):
            raise ValueError(f"{name} is a {type(tensor).__name__}, must be a torch.Tensor")
    if not isinstance(activation, str):
        raise ValueError(f"activation is {activation!r}, must be a string")
    if not isinstance(backend, str):
        raise ValueError(f"backend is {backend!r}, must be a string")
    for name, flag in zip(FLAGS, flags, strict=True):
        if not isinstance(flag, bool):
            raise ValueError(f"{name} is {flag!r}, must be True or False")
    _refuse_grad(tensors)


_OPTIONAL = ("gate_up_bias", "down_bias", "sum_weights")


def _refuse_grad(tensors: Sequence[Tensor | None]) -> None:
    if not torch.is_grad_enabled():
        return
    for name, tensor in zip(TENSORS, tensors, strict=True):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} requires grad in grad mode, must not: there is no backward, "
                "call under torch.no_grad()"
            )


# Not torch.library.custom_op, which takes ten times as long to get to the implementation.
_library = torch.library.Library("reap", "DEF")
for _name, _weights, _results in (
    ("moe_saliency", "", "Tensor, Tensor, Tensor"),
    ("moe_saliency_sums", "Tensor sum_weights, ", "Tensor, Tensor, Tensor, Tensor, Tensor"),
):
    _library.define(
        f"{_name}(Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, "
        "Tensor top_k_index, Tensor top_k_weights, Tensor? gate_up_bias, Tensor? down_bias, "
        f"{_weights}str activation, bool gated, bool interleaved, bool transposed, "
        f"bool deterministic, str backend) -> ({_results})",
        tags=torch.Tag.pt2_compliant_tag,
    )
_OP = torch.ops.reap.moe_saliency.default
_OP_SUMS = torch.ops.reap.moe_saliency_sums.default
_SUMLESS = len(TENSORS) - 1  # where the op without sums has no argument


def _run(*arguments):  # type: ignore[no-untyped-def]
    """The op on real tensors, whoever calls it."""
    return _run_sums(*arguments[:_SUMLESS], None, *arguments[_SUMLESS:])


def _run_sums(*arguments):  # type: ignore[no-untyped-def]
    *fields, backend = arguments
    _refuse_grad(fields[: len(TENSORS)])
    call = make_call(*fields)
    chosen = select(call, backend)
    if not getattr(chosen, "ASSERTS_IDS", False):
        check_ids(call.top_k_index)
    kind = call.hidden_states.device.type
    try:
        if not torch.is_autocast_enabled(kind):
            return chosen.run(call)
        # The dtypes are part of the contract: autocast must not change them under a backend's feet.
        with torch.autocast(kind, enabled=False):
            return chosen.run(call)
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
        raise torch.OutOfMemoryError(
            f"no memory for {call.T * call.K} slots on {chosen.NAME}: pass fewer tokens at a time "
            f"({reason})"
        ) from error


def _fake(*arguments):  # type: ignore[no-untyped-def]
    return _fake_sums(*arguments[:_SUMLESS], None, *arguments[_SUMLESS:])


def _fake_sums(*arguments):  # type: ignore[no-untyped-def]
    *fields, backend = arguments
    call = make_call(*fields)
    named(backend)
    x, wide = call.hidden_states, call.accumulator
    norms = x.new_empty((call.T, call.K), dtype=wide)
    result = x.new_empty((call.T, call.H)), norms, torch.empty_like(norms)
    if call.sum_weights is None:
        return result
    sums = (x.new_empty((2, call.E, width), dtype=wide) for width in (call.I, call.H))
    return *result, *sums


# The compiler, which an uncompiled caller may run under, has no business in a backend.
for _name, _real, _shaped in (
    ("moe_saliency", _run, _fake),
    ("moe_saliency_sums", _run_sums, _fake_sums),
):
    _library.impl(_name, torch._compile._disable_dynamo(_real), "CompositeExplicitAutograd")
    torch.library.register_fake(f"reap::{_name}", _shaped, lib=_library)


def named(backend: str) -> tuple[Backend, ...]:
    """The backends that may run a call: the one of that name, or all of them for "auto"."""
    candidates = tuple(b for b in LADDER if _may_run(b, backend))
    if not candidates:
        names = ", ".join(b.NAME for b in LADDER)
        raise ValueError(f"backend is {backend!r}, must be auto or one of {names}")
    return candidates


def _may_run(candidate: Backend, backend: str) -> bool:
    return backend in ("auto", candidate.NAME)


def select(call: Call, backend: str) -> Backend:
    """The first candidate that can run the call; ValueError with each one's reason if none can."""
    for candidate in LADDER:
        if (
            _may_run(candidate, backend)
            and candidate.available() is None
            and candidate.unsupported(call) is None
        ):
            return candidate
    reasons = [f"{c.NAME}: {c.available() or c.unsupported(call)}" for c in named(backend)]
    raise ValueError(f"backend is {backend!r}, which cannot run this call: {'; '.join(reasons)}")
