"""Random weights and routing at the scale of real layers, quickly."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench.shapes import Shape

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


def weights(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """gate_up_proj [E,2I,H] and down_proj [E,H,I], with variance 1/fan-in."""
    gate_up = torch.empty(shape.E, 2 * shape.I, shape.H, dtype=dtype, device=device)
    down = torch.empty(shape.E, shape.H, shape.I, dtype=dtype, device=device)
    return {
        "gate_up_proj": fill(gate_up, shape.H**-0.5),
        "down_proj": fill(down, shape.I**-0.5, start=POOL // 2),
    }


def routed(shape: Shape, T: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """hidden_states [T,H], top_k_index [T,K] uniform without repeats, top_k_weights [T,K] that sum
    to 1 in the model dtype, as Qwen3's router hands them on; and the options of a SwiGLU layer."""
    g = torch.Generator().manual_seed(T)
    scores, ids = torch.randn(T, shape.E, generator=g).topk(shape.K, dim=1)
    return {
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
