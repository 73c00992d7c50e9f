"""The merged expert: a weighted mean of weights, the same bits from memory and from files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# What is averaged, and in which precision the products are added up before one rounding. Anything
# else holds packed numbers.
WIDE = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float64,
    torch.float64: torch.float64,
}


def average(parts: Iterable[Tensor], shares: Sequence[float]) -> Tensor:
    """Sum of shares[i] * parts[i], all of one shape and dtype, rounded once to that dtype.

    Element by element, with products rounded before they are added, so that the bits depend neither
    on how the tensor is cut nor on what a processor fuses.
    """
    total: Tensor | None = None
    dtype = torch.float32
    for part, share in zip(parts, shares, strict=True):
        dtype = part.dtype
        product = part.to(WIDE[dtype]) * share
        total = product if total is None else total.add_(product)
    assert total is not None, "a group has experts"
    return total.to(dtype)
