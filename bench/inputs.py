"""Random weights and routing at the scale of real layers, quickly."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench.shapes import Shape
from reap_kernels import swiglu_clamped

# uniform: each token picks K experts at random. even: every expert gets as many slots, so that no
# tile of a grouped kernel is padded where that number is a multiple of its rows.
ROUTINGS = ("uniform", "even")
# Prime, so that rows of any power of two start at different places of the pool.
POOL = 8_388_593


@cache
def _pool(device: str) -> Tensor:
    return torch.randn(POOL, generator=torch.Generator().manual_seed(0)).to(device)


def fill(tensor: Tensor, scale: float, start: int = 0) -> Tensor:
    """Normal values in place, 8 million repeated: 15 GB of fresh ones would take minutes."""
    left = tensor.view(-1)
    while left.numel():
        source = _pool(tensor.device.type)[start:][: left.numel()]
        torch.mul(source, scale, out=left[: source.numel()])
        left, start = left[source.numel() :], 0
    return tensor


def weights(
    shape: Shape, dtype: torch.dtype, device: str = "cpu", experts: int | None = None
) -> dict[str, Tensor]:
    """gate_up_proj [E,2I,H] and down_proj [E,H,I], with variance 1/fan-in; a shape with a layout of
    its `own` has both transposed, and biases. experts: so many instead of E."""
    E, H, I = experts or shape.E, shape.H, shape.I  # noqa: E741
    up, down = ((E, H, 2 * I), (E, I, H)) if shape.own else ((E, 2 * I, H), (E, H, I))

    def filled(sizes: tuple[int, ...], scale: float, start: int = 0) -> Tensor:
        return fill(torch.empty(sizes, dtype=dtype, device=device), scale, start)

    made = {
        "gate_up_proj": filled(up, H**-0.5),
        "down_proj": filled(down, I**-0.5, start=POOL // 2),
    }
    if shape.own:
        made |= {"gate_up_bias": filled((E, 2 * I), 1.0), "down_bias": filled((E, H), 1.0)}
    return made


def routed(
    shape: Shape, T: int, dtype: torch.dtype, device: str = "cpu", routing: str = "uniform"
) -> dict[str, Any]:
    """hidden_states [T,H], top_k_index [T,K] without repeats, top_k_weights [T,K] that sum to 1 in
    the model dtype, as Qwen3's router hands them on; and the options of the layer."""
    g = torch.Generator().manual_seed(T)
    scores, ids = torch.randn(T, shape.E, generator=g).topk(shape.K, dim=1)
    if routing == "even":
        slots = torch.arange(T * shape.K).view(T, shape.K)[torch.randperm(T, generator=g)]
        ids = torch.randperm(shape.E, generator=g)[slots % shape.E]
    given: dict[str, Any] = {
        "hidden_states": torch.randn(T, shape.H, generator=g).to(device, dtype),
        "top_k_index": ids.to(device),
        "top_k_weights": scores.softmax(dim=1).to(device, dtype),
        "gate_up_bias": None,
        "down_bias": None,
        "activation": "silu",
        "gated": True,
        "interleaved": False,
        "transposed": False,
    }
    if shape.own:
        clamped = swiglu_clamped(1.702, 7.0, 1.0)
        given |= {"activation": clamped, "interleaved": True, "transposed": True}
    return given
