"""The gates of a token's slots, as statistics take them: those that the router applies, or divided
by their sum."""

from __future__ import annotations

import torch
from torch import Tensor

from reap.errors import ReapError

GATES = ("applied", "renormalized")


def check_gates(gates: str) -> None:
    """ReapError for a way to read gates that there is not."""
    if gates not in GATES:
        raise ReapError(f"gates is {gates!r}: it must be one of {', '.join(GATES)}")


def read_gates(weights: Tensor, gates: str) -> Tensor:
    """The gates [T,K] fp64 of a router's weights that `gates` asks for."""
    if gates == "applied":
        return weights
    # Column by column: a reduction's order could depend on the shape, and with it the bits.
    total = torch.zeros_like(weights[:, 0])
    for column in weights.unbind(1):
        total = total + column
    return torch.where(total[:, None] == 0, 0.0, weights / total[:, None])
