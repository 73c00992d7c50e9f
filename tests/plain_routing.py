"""Top-k ids -> the order in which a grouped kernel walks the slots."""

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Slots grouped by expert. A slot is token * K + k, so its token is slot // K."""

    order: Tensor  # sorted position -> slot; slots without expert come last [S] int64
    offsets: Tensor  # expert -> first sorted position; [E] ends the last expert [E+1] int64
    counts: Tensor  # expert -> number of slots [E] int64


def route(top_k_index: Tensor, num_experts: int) -> Routing:
    """Groups the slots of top_k_index ([T, K] int32 or int64, ids >= 0) by expert, ascending within
    an expert. Ids >= num_experts belong to no expert and come last. Never waits for the GPU."""
    flat = top_k_index.reshape(-1).clamp(max=num_experts)  # slot -> expert, all sentinels alike [S]
    expert, order = torch.sort(flat, stable=True)  # sorted position -> expert, -> slot [S]
    bounds = torch.arange(num_experts + 1, dtype=expert.dtype, device=expert.device)
    offsets = torch.searchsorted(expert, bounds)
    return Routing(order, offsets, offsets.diff())
