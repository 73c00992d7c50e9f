"""Weights for the sums over an expert's slots, the truth about them, and the accuracy rule."""

from itertools import product

import cases
import torch

from reap_kernels import Saliency, Summed


def weights_of(inputs: dict, counted: float = 0.8, seed: int = 3) -> torch.Tensor:
    """[2, T, K]: 1 and the gate, both 0 in slots of tokens that are not counted."""
    ids, gates = inputs["top_k_index"], inputs["top_k_weights"]
    g = torch.Generator().manual_seed(seed)
    token = (torch.rand(len(ids), 1, generator=g) < counted).to(ids.device)
    wide = gates.dtype if gates.dtype == torch.float64 else torch.float32
    return torch.stack([token.expand(ids.shape).to(wide), torch.where(token, gates.to(wide), 0)])


def truth(inputs: dict, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Channel sums [2, E, I] and output sums [2, E, H], slot by slot in fp64 on the CPU."""
    there = {k: v.cpu() if torch.is_tensor(v) else v for k, v in inputs.items()}
    x, ids, weights = there["hidden_states"].double(), there["top_k_index"], weights.cpu().double()
    E, H, I = _sizes(there)  # noqa: E741
    channels, outputs = (torch.zeros(2, E, n, dtype=torch.float64) for n in (I, H))
    for t, k in product(*map(range, ids.shape)):
        expert = int(ids[t, k])
        if expert >= E or not weights[:, t, k].any():
            continue
        h = _inner(x[t], expert, there)
        down = there["down_proj"][expert].double()
        y = (down.T if there["transposed"] else down) @ h
        if there["down_bias"] is not None:
            y = y + there["down_bias"][expert].double()
        channels[:, expert] += weights[:, t, k, None] * h
        outputs[:, expert] += weights[:, t, k, None] * y
    return channels, outputs


def plain(inputs: dict, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a hook on transformers' eager experts would add up in fp32, on the inputs' device."""
    x, ids = inputs["hidden_states"], inputs["top_k_index"]
    E, H, I = _sizes(inputs)  # noqa: E741
    channels, outputs = (torch.zeros(2, E, n, device=x.device) for n in (I, H))
    up, down = inputs["gate_up_proj"], inputs["down_proj"]
    if inputs["transposed"]:
        up, down = up.mT, down.mT
    biases = inputs["gate_up_bias"], inputs["down_bias"]
    for expert in range(E):
        token, k = torch.where(ids == expert)
        one, other = (None if bias is None else bias[expert] for bias in biases)
        z = torch.nn.functional.linear(x[token], up[expert], one)
        h = cases._eager_activation(z, inputs)
        y = torch.nn.functional.linear(h, down[expert], other)
        for w, c, o in zip(weights[:, token, k], channels, outputs, strict=True):
            c[expert] = (w[:, None] * h.float()).sum(0)
            o[expert] = (w[:, None] * y.float()).sum(0)
    return channels, outputs


def assert_accurate(result: Saliency | Summed, inputs: dict, weights: torch.Tensor) -> None:
    """Every sum's error against the truth is at most plain torch's, plus an epsilon."""
    assert isinstance(result, Summed)
    dtype = inputs["hidden_states"].dtype
    exacts, plains = truth(inputs, weights), plain(inputs, weights)
    ours = result.channel_sums, result.output_sums
    for name, sums, exact, theirs in zip(
        ("channels", "outputs"), ours, exacts, plains, strict=True
    ):
        assert sums.dtype == torch.float32 and sums.shape == exact.shape, name
        assert not sums.cpu()[exact == 0].any() or exact.any(), name
        for measure in (cases._root_mean_square, cases._worst):
            scale = measure(exact) or 1.0
            error = measure(sums.cpu().double() - exact) / scale
            bound = measure(theirs.cpu().double() - exact) / scale + cases.EPSILON[dtype]
            assert error <= bound, f"{name}: {measure.__name__} error {error:.3g} > {bound:.3g}"


def _sizes(inputs: dict) -> tuple[int, int, int]:
    E, H, I = inputs["down_proj"].shape  # noqa: E741
    return (E, I, H) if inputs["transposed"] else (E, H, I)


def _inner(x: torch.Tensor, expert: int, inputs: dict) -> torch.Tensor:
    """[H] fp64 -> [I] fp64"""
    up = inputs["gate_up_proj"][expert].double()
    z = (up.T if inputs["transposed"] else up) @ x
    if inputs["gate_up_bias"] is not None:
        z = z + inputs["gate_up_bias"][expert].double()
    if inputs["interleaved"]:
        z = z.reshape(-1, 2).T.reshape(-1)
    return cases._inner(z, inputs["activation"], inputs["gated"])
