"""One grid of calls for every backend, the truth about each, and the project's accuracy rule.

    inputs = make(case, dtype)
    assert_accurate(moe_saliency(**inputs, backend=...), inputs)

`truth` computes slot by slot in fp64 and shares no code with the package. `plain` is what people
run today: transformers' eager loop in the model dtype. A result is accurate if its error against
the truth is at most that of `plain`, plus an epsilon for `plain`'s luck on small tensors.
"""

import functools
import math
from dataclasses import dataclass, replace
from itertools import product

import torch
import torch.nn.functional as F

from reap_kernels import Saliency, Summed, moe_saliency, swiglu_clamped

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Relative to the size of the tensor: half of one rounding to the model dtype (its eps / 4), and in
# fp32, where all errors come from the order of the sums, two eps.
EPSILON = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-22}


@dataclass(frozen=True)
class Case:
    """A call of moe_saliency; `why` is its reason and its test id."""

    why: str
    T: int = 33
    K: int = 3
    E: int = 7
    H: int = 97
    I: int = 47  # noqa: E741
    activation: str = "silu"
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    bias: bool = False
    routing: str = "top_k"  # see _ids
    strides: str = "contiguous"  # see _restride
    ids: torch.dtype = torch.int64
    gates: torch.dtype | None = torch.float32  # None: the model dtype

    def __str__(self) -> str:
        return self.why.replace(" ", "-")


SHAPES = [
    Case("odd sizes and a prime number of experts"),
    Case("sizes that fill tiles", T=64, K=4, E=8, H=128, I=64),
    Case("one more than tiles", T=65, K=1, E=1, H=129, I=65),
    Case("no token", T=0),
    Case("one token", T=1),
    Case("one of everything", T=1, K=1, E=1, H=1, I=1),
    Case("every expert for every token", T=19, K=5, E=5),
    Case("more experts than slots", T=3, K=2, E=61),
    Case("inner size above hidden size", T=21, H=24, I=160),
]
LAYOUTS = [
    Case(
        f"{name}{' transposed' * transposed}{' biased' * bias}",
        gated=name != "ungated",
        interleaved=name == "interleaved",
        transposed=transposed,
        bias=bias,
    )
    for name, transposed, bias in product(
        ("concatenated", "interleaved", "ungated"), (False, True), (False, True)
    )
]
ACTIVATIONS = [
    Case(f"{activation} {'gated' if gated else 'ungated'}", activation=activation, gated=gated)
    for activation, gated in product(("silu", "gelu", "gelu_tanh", "relu", "relu2"), (True, False))
] + [
    Case(why, activation=activation, interleaved=True, transposed=True, bias=True)
    for why, activation in (
        ("gpt-oss with a limit that clamps", swiglu_clamped(1.702, 0.7, 1.0)),
        ("deepseek-v4 with a limit that clamps", swiglu_clamped(1.0, 0.5, 0.0)),
        ("clamped swiglu without limit", swiglu_clamped(1.702, math.inf, 1.0)),
    )
]
ROUTINGS = [
    Case(f"routing {routing.replace('_', ' ')}", routing=routing, bias=True)
    for routing in ("some_sentinels", "all_sentinels", "one_expert", "half_the_experts", "repeats")
] + [
    Case("int32 ids and gates in the model dtype", ids=torch.int32, gates=None),
    Case("bf16 gates", gates=torch.bfloat16),
    Case("fp16 gates", gates=torch.float16),
]
STRIDES = [
    replace(case, why=f"{case.why} {strides}", strides=strides, routing="some_sentinels")
    for case in (LAYOUTS[1], LAYOUTS[7], LAYOUTS[9])
    for strides in ("stepped", "permuted", "broadcast")
]
CASES = SHAPES + LAYOUTS + ACTIVATIONS + ROUTINGS + STRIDES


def make(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict:
    """The keyword arguments of moe_saliency, except `backend` and `deterministic`."""
    g = torch.Generator().manual_seed(seed)
    T, K, E, H, I = case.T, case.K, case.E, case.H, case.I  # noqa: E741
    R = 2 * I if case.gated else I

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    up, down = normal(E, R, H, scale=H**-0.5), normal(E, H, I, scale=I**-0.5)
    gates = torch.rand(T, K, generator=g).softmax(dim=1).to(case.gates or dtype)
    tensors = {
        "hidden_states": normal(T, H),
        "gate_up_proj": up.mT.contiguous() if case.transposed else up,
        "down_proj": down.mT.contiguous() if case.transposed else down,
        "top_k_index": _ids(case, g).to(case.ids),
        "top_k_weights": gates,
        "gate_up_bias": normal(E, R) if case.bias else None,
        "down_bias": normal(E, H) if case.bias else None,
    }
    placed = {
        name: None if tensor is None else _restride(tensor.to(device), case.strides)
        for name, tensor in tensors.items()
    }
    options = ("activation", "gated", "interleaved", "transposed")
    return placed | {name: getattr(case, name) for name in options}


def _ids(case: Case, g: torch.Generator) -> torch.Tensor:
    """[T, K] int64."""
    T, K, E = case.T, case.K, case.E
    distinct = torch.rand(T, E, generator=g).argsort(dim=1)[:, :K]
    if case.routing == "top_k":
        return distinct
    if case.routing == "some_sentinels":  # E, and ids far above it
        away = torch.rand(T, K, generator=g) < 0.4
        return torch.where(away, torch.randint(E, 4 * E, (T, K), generator=g), distinct)
    if case.routing == "half_the_experts":
        return distinct // 2 * 2
    if case.routing == "repeats":
        return torch.randint(0, E, (T, K), generator=g)
    return torch.full((T, K), {"all_sentinels": E, "one_expert": E // 2}[case.routing])


def _restride(tensor: torch.Tensor, strides: str) -> torch.Tensor:
    """The same values in another memory layout; memory in between holds what must not be read."""
    if strides == "contiguous":
        return tensor
    if strides == "permuted":  # the last dimension is the slowest
        return tensor.movedim(-1, 0).contiguous().movedim(0, -1)
    if strides == "stepped":  # every other element of rows that are longer still
        poison = torch.nan if tensor.is_floating_point() else -1
        wider = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), poison)
        view = wider[..., 1 : 1 + 2 * tensor.shape[-1] : 2]
        view.copy_(tensor)
        return view
    assert strides == "broadcast"  # stride 0: one row, or one expert, for all
    return tensor[:1].expand_as(tensor)


def assert_accurate(
    result: Saliency | Summed,
    inputs: dict,
    known: tuple[Saliency, Saliency] | None = None,
    *,
    drawn: bool = False,
) -> None:
    """The accuracy rule, on the tensor as a whole (root mean square) and on its worst element.

    known: `truth` and `plain` of these inputs, where they are asked for more than once.
    drawn: the inputs are one of many draws. In one of some hundred small ones `plain` is so lucky
    in its worst element that the specification fails: its error then stands beside `plain`'s.
    """
    dtype = inputs["hidden_states"].dtype
    assert result.out.dtype == dtype
    assert result.norms.dtype == result.peaks.dtype == torch.float32
    nobody = inputs["top_k_index"] >= inputs["gate_up_proj"].shape[0]
    assert not result.norms[nobody].any() and not result.peaks[nobody].any()
    exacts, plains = known or (truth(inputs), plain(inputs))
    for name, ours, exact, theirs in zip(Saliency._fields, result, exacts, plains, strict=True):
        assert ours.shape == exact.shape, name
        if exact.numel() == 0:
            continue
        for measure in (_root_mean_square, _worst):
            scale = measure(exact) or 1.0
            error = measure(ours.cpu().double() - exact) / scale
            bound = measure(theirs.cpu().double() - exact) / scale + EPSILON[dtype]
            if error > bound and drawn:
                specified = getattr(moe_saliency(**inputs, backend="reference"), name)
                bound = measure(specified.cpu().double() - exact) / scale + EPSILON[dtype]
            assert error <= bound, f"{name}: {measure.__name__} error {error:.3g} > {bound:.3g}"


@functools.lru_cache(maxsize=8)
def known(case: Case, dtype: torch.dtype) -> tuple[Saliency, Saliency]:
    """`truth` and `plain` of `make(case, dtype)`, for tests that ask for them in a row."""
    inputs = make(case, dtype)
    return truth(inputs), plain(inputs)


def _root_mean_square(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def _worst(x: torch.Tensor) -> float:
    return x.abs().max().item()


def truth(inputs: dict, device: str = "cpu") -> Saliency:
    """Slot by slot in fp64, with nothing rounded in between, on the CPU; large ones take long
    there, and may be computed on another device."""
    there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    x, ids, gates = (there[k].cpu() for k in ("hidden_states", "top_k_index", "top_k_weights"))
    x = x.double()
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    norms = torch.zeros(ids.shape, dtype=torch.float64)
    peaks = torch.zeros(ids.shape, dtype=torch.float64)
    for t, k in product(range(ids.shape[0]), range(ids.shape[1])):
        expert = int(ids[t, k])
        if expert < there["down_proj"].shape[0]:
            y = _one_expert(x[t].to(device), expert, there).cpu()
            norms[t, k] = sum(y.square().tolist()) ** 0.5
            peaks[t, k] = max(y.abs().tolist())
            out[t] += gates[t, k].double() * y
    return Saliency(out, norms, peaks)


def _one_expert(x: torch.Tensor, expert: int, inputs: dict) -> torch.Tensor:
    """f(x) of one token, [H] fp64 -> [H] fp64."""
    up, down = inputs["gate_up_proj"][expert].double(), inputs["down_proj"][expert].double()
    if inputs["transposed"]:
        up, down = up.T, down.T
    z = up @ x
    if inputs["gate_up_bias"] is not None:
        z = z + inputs["gate_up_bias"][expert].double()
    if inputs["interleaved"]:
        z = z.reshape(-1, 2).T.reshape(-1)  # g0 u0 g1 u1 -> g0 g1 u0 u1
    y = down @ _inner(z, inputs["activation"], inputs["gated"])
    if inputs["down_bias"] is not None:
        y = y + inputs["down_bias"][expert].double()
    return y


def _inner(z: torch.Tensor, activation: str, gated: bool) -> torch.Tensor:
    """[R] fp64 -> [I] fp64, the activations written out."""
    g, u = z.split(z.shape[0] // 2) if gated else (z, torch.ones_like(z))
    if activation.startswith("swiglu_clamped"):
        alpha, limit, offset = map(float, activation.split("(")[1].rstrip(")").split(","))
        g = torch.where(g > limit, limit, g)
        u = torch.where(u.abs() > limit, limit * u.sign(), u)
        return g / (1 + (-alpha * g).exp()) * (u + offset)
    if activation == "silu":
        return g / (1 + (-g).exp()) * u
    if activation == "gelu":
        return g * (1 + torch.erf(g / 2**0.5)) / 2 * u
    if activation == "gelu_tanh":
        return g * (1 + torch.tanh((2 / math.pi) ** 0.5 * (g + 0.044715 * g**3))) / 2 * u
    positive = g * (g > 0)
    return (positive * positive if activation == "relu2" else positive) * u


def plain(inputs: dict) -> Saliency:
    """transformers' eager experts in the model dtype, with the norms that a hook would read off."""
    x, ids, gates = inputs["hidden_states"], inputs["top_k_index"], inputs["top_k_weights"]
    up, down = inputs["gate_up_proj"], inputs["down_proj"]
    if inputs["transposed"]:
        up, down = up.mT, down.mT
    up_bias, down_bias = inputs["gate_up_bias"], inputs["down_bias"]
    out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    norms = torch.zeros(ids.shape, dtype=torch.float32, device=x.device)
    peaks = torch.zeros_like(norms)
    for expert in range(up.shape[0]):
        token, k = torch.where(ids == expert)
        z = F.linear(x[token], up[expert], None if up_bias is None else up_bias[expert])
        inner = _eager_activation(z, inputs)
        y = F.linear(inner, down[expert], None if down_bias is None else down_bias[expert])
        norms[token, k] = y.float().norm(dim=1)
        peaks[token, k] = y.float().abs().amax(dim=1)
        out.index_add_(0, token, (y * gates[token, k, None]).to(x.dtype))
    return Saliency(out, norms, peaks)


def _eager_activation(z: torch.Tensor, inputs: dict) -> torch.Tensor:
    """[n, R] -> [n, I] in the model dtype."""
    kind, _, numbers = inputs["activation"].rstrip(")").partition("(")
    act = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda x: F.relu(x).square(),
    }.get(kind)
    if not inputs["gated"]:
        assert act is not None
        return act(z)
    gate, up = (z[..., ::2], z[..., 1::2]) if inputs["interleaved"] else z.chunk(2, dim=-1)
    if act is not None:
        return act(gate) * up
    alpha, limit, offset = map(float, numbers.split(","))
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + offset) * (gate * torch.sigmoid(gate * alpha))
