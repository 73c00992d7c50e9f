"""What the op takes and returns, and the checks that every call passes before a backend sees it.

Letters: T tokens, K experts per token, S = T*K slots, E experts, H hidden size, I inner size of an
expert, R = 2I rows of gate and up (I where there is no gate).
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from reap_kernels import activations
from reap_kernels.activations import Activation

GATE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# float64 is for the truth that tests compare against; only `reference` runs it.
MODEL_DTYPES = (*GATE_DTYPES, torch.float64)
ID_DTYPES = (torch.int32, torch.int64)


class Saliency(NamedTuple):
    """The layer's output and, per slot, the size of the expert's output before its gate."""

    out: Tensor  # sum over k of gate * f(x) [T, H] model dtype
    norms: Tensor  # ||f(x)||_2 [T, K] fp32 (fp64 for an fp64 model)
    peaks: Tensor  # max |f(x)| [T, K] fp32 (fp64 for an fp64 model)


class Summed(NamedTuple):
    """The same, and per expert the weighted sums over its slots of what is inside and of what comes
    out: h = act(gate(x)) * up(x) as the down projection sees it, and f(x) before its gate."""

    out: Tensor
    norms: Tensor
    peaks: Tensor
    channel_sums: Tensor  # sum of w * h [2, E, I] fp32 (fp64 for an fp64 model)
    output_sums: Tensor  # sum of w * f(x) [2, E, H] fp32 (fp64 for an fp64 model)


class Call(NamedTuple):
    """One call of the op: the tensors as they came, strides and all, and the parsed options.

    Fields are in the order of the op's schema, and have the defaults of `moe_saliency`.
    """

    hidden_states: Tensor  # [T, H] model dtype
    gate_up_proj: Tensor  # [E, R, H], or [E, H, R] if transposed, model dtype
    down_proj: Tensor  # [E, H, I], or [E, I, H] if transposed, model dtype
    top_k_index: Tensor  # expert of each slot, >= E for none [T, K] int32 or int64
    top_k_weights: Tensor  # gate of each slot [T, K] bf16, fp16, fp32 (or fp64 in an fp64 model)
    gate_up_bias: Tensor | None = None  # [E, R] model dtype
    down_bias: Tensor | None = None  # [E, H] model dtype
    sum_weights: Tensor | None = None  # w of each slot in the two sums, 0: left out [2, T, K] fp32
    activation: Activation = Activation("silu")
    gated: bool = True  # False: up_proj alone, act(x W) in place of act(g) * u
    interleaved: bool = False  # gate and up alternate along R: g0, u0, ...; else all g, then all u
    transposed: bool = False
    deterministic: bool = False  # the same bits run to run, on backends where that has a price

    @property
    def T(self) -> int:
        return self.hidden_states.shape[0]

    @property
    def K(self) -> int:
        return self.top_k_index.shape[1]

    @property
    def E(self) -> int:
        return self.gate_up_proj.shape[0]

    @property
    def H(self) -> int:
        return self.hidden_states.shape[1]

    @property
    def R(self) -> int:
        return self.gate_up_proj.shape[2 if self.transposed else 1]

    @property
    def I(self) -> int:  # noqa: E743
        return self.R // 2 if self.gated else self.R

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of every sum, and of norms and peaks."""
        wide = self.hidden_states.dtype == torch.float64
        return torch.float64 if wide else torch.float32


def _fields_of(*kinds: Any) -> tuple[str, ...]:
    return tuple(name for name, kind in Call.__annotations__.items() if kind in kinds)


# The op's arguments of one kind, in the order of its schema.
TENSORS = _fields_of(Tensor, Tensor | None)
FLAGS = _fields_of(bool)


class Backend(Protocol):
    """What a backend module has.

    One that also has ASSERTS_IDS = True refuses ids below 0 itself; for the others the op reads the
    ids first, which waits for a GPU. One that ran on few of the chips where users run it says in
    CAVEAT on which.
    """

    NAME: str

    def available(self) -> str | None:
        """Why nothing runs on this machine, in one line; None if it does."""

    def unsupported(self, call: Call) -> str | None:
        """Which feature of this call is missing, in one line; None if all are there."""

    def run(self, call: Call) -> Saliency | Summed:
        """Runs a checked call: Summed where it has sum_weights. The results share no memory with
        the inputs."""


def check(call: Call) -> None:
    """Raises ValueError for the first argument that breaks the contract; reads no tensor's data.

    Every call of every layer passes here: what a message needs is put together where one fails.
    """
    _check_kinds(call)
    _check_options(call)
    _check_shapes(call)


def check_ids(top_k_index: Tensor) -> None:
    """Raises ValueError for an id below 0; reads the data, so on a GPU it waits for it."""
    if top_k_index.numel() and (least := int(top_k_index.min())) < 0:
        raise ValueError(
            f"top_k_index holds the id {least}, must be >= 0 (an id >= E is a slot without expert)"
        )


_RANKS = (2, 3, 3, 2, 2, 2, 2, 3)  # in the order of TENSORS


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _check_kinds(call: Call) -> None:
    """Ranks, dtypes, device and layout."""
    model, device = call.hidden_states.dtype, call.hidden_states.device
    same, gates = (model,), MODEL_DTYPES if model == torch.float64 else GATE_DTYPES
    dtypes = (MODEL_DTYPES, same, same, ID_DTYPES, gates, same, same, (call.accumulator,))
    for name, tensor, rank, allowed in zip(TENSORS, call, _RANKS, dtypes, strict=False):
        if tensor is None:
            continue
        if tensor.dim() != rank:
            raise ValueError(f"{name} has shape {_shape(tensor)}, must have {rank} dimensions")
        if tensor.dtype not in allowed:
            as_model = " as hidden_states" if allowed is same else ""
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{name} has dtype {dtype}, must be {names}{as_model}")
        if tensor.device != device:
            raise ValueError(
                f"{name} is on device {tensor.device}, must be on {device} as hidden_states"
            )
        if tensor.layout is not torch.strided:
            raise ValueError(f"{name} has layout {tensor.layout}, must be torch.strided")


def _check_options(call: Call) -> None:
    if call.gated:
        return
    if call.activation.kind == "swiglu_clamped":
        raise ValueError("activation is swiglu_clamped, must be an ungated one where gated=False")
    if call.interleaved:
        raise ValueError("interleaved is True, must be False where gated=False: there is no gate")


def _check_shapes(call: Call) -> None:
    (T, H), K = call.hidden_states.shape, call.K
    E, R, width = call.gate_up_proj.shape
    if call.transposed:
        R, width = width, R
    if 0 in (H, K, E, R, width):
        name = "hidden_states" if H == 0 else "top_k_index" if K == 0 else "gate_up_proj"
        raise ValueError(f"{name} has shape {_shape(getattr(call, name))}, must not be empty")
    if call.gated and R % 2:
        raise ValueError(
            f"gate_up_proj has shape {_shape(call.gate_up_proj)}, must have as many gate "
            f"as up rows, not {R} in all: pass gated=False if the experts have no gate"
        )
    I = R // 2 if call.gated else R  # noqa: E741
    weights = ((E, H, R), (E, I, H)) if call.transposed else ((E, R, H), (E, H, I))
    shapes = ((T, H), *weights, (T, K), (T, K), (E, R), (E, H), (2, T, K))
    for name, tensor, expected in zip(TENSORS, call, shapes, strict=False):
        if tensor is not None and tensor.shape != expected:
            raise ValueError(
                f"{name} has shape {_shape(tensor)}, must be {list(expected)} = "
                f"[{', '.join(_letters(call)[name])}] "
                f"(gated={call.gated}, transposed={call.transposed})"
            )


def _letters(call: Call) -> dict[str, tuple[str, ...]]:
    """The sizes of each tensor that depend on another's, in words."""
    up = "2I" if call.gated else "I"
    return {
        "gate_up_proj": ("E", "H", up) if call.transposed else ("E", up, "H"),
        "down_proj": ("E", "I", "H") if call.transposed else ("E", "H", "I"),
        "top_k_index": ("T", "K"),
        "top_k_weights": ("T", "K"),
        "gate_up_bias": ("E", up),
        "down_bias": ("E", "H"),
        "sum_weights": ("2", "T", "K"),
    }


def make_call(*fields: Any, **named: Any) -> Call:
    """A checked call, from Call's fields by position or by name; the activation as its text."""
    call = Call(*fields, **named)
    if not isinstance(call.activation, Activation):
        call = call._replace(activation=activations.parse(call.activation))
    check(call)
    return call
