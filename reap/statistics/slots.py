"""What one call of a layer brings to its statistics: T tokens with K slots each."""

from __future__ import annotations

import torch
from torch import Tensor

from reap.errors import ReapError


def check_slots(
    top_k_index: Tensor,
    top_k_weights: Tensor,
    norms: Tensor,
    peaks: Tensor,
    mask: Tensor | None,
) -> None:
    """ReapError for shapes or dtypes that are not those of one call: [T,K] four times, and [T]."""
    if top_k_index.dim() != 2 or top_k_index.dtype not in (torch.int64, torch.int32):
        raise ReapError(
            f"top_k_index is {_describe(top_k_index)}: it must be [tokens, top_k] int64"
        )
    named = {"top_k_weights": top_k_weights, "norms": norms, "peaks": peaks}
    for what, tensor in named.items():
        if tensor.shape != top_k_index.shape or not tensor.is_floating_point():
            raise ReapError(
                f"{what} is {_describe(tensor)}: it must be floating point and of "
                f"top_k_index's shape {list(top_k_index.shape)}"
            )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != top_k_index.shape[:1]):
        raise ReapError(
            f"mask is {_describe(mask)}: it must be [{len(top_k_index)}] bool, True to count"
        )


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
