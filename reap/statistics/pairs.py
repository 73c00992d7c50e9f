"""Statistics of the unordered pairs of experts that one token chose: many, and seldom asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from reap.statistics.exact import ExactSum, Rows
from reap.statistics.lazyrows import LazyRows


class Pairs:
    """Of E experts: how many tokens chose both of a pair, and the exact sum over them of the
    product of the two weighted norms. The pair i < j is at j*(j-1)/2 + i, of P = E*(E-1)/2.

    What was read from a file stays there, and what was not added to takes no memory.
    """

    def __init__(self, experts: int, device: torch.device) -> None:
        self._experts, self._device = experts, device
        self._count: Tensor | LazyRows | None = None  # [P] int64; None: zero
        self.sums = ExactSum(experts * (experts - 1) // 2, device)  # [P]

    @classmethod
    def of(cls, experts: int, count: Tensor | LazyRows, sums: Rows) -> Pairs:
        """From [P] int64 and canonical sums [P,20] int32, which nobody writes to any more."""
        self = cls(experts, torch.device("cpu"))
        self._count, self.sums = count, ExactSum.from_canonical(sums)
        return self

    @property
    def live_count(self) -> Tensor:
        """[P] int64 on the device, to be added to."""
        if not isinstance(self._count, Tensor):
            with torch.inference_mode(False):
                if self._count is None:
                    size = self.sums.cells
                    self._count = torch.zeros(size, dtype=torch.int64, device=self._device)
                else:
                    self._count = self._count[:].to(self._device)
        return self._count

    @property
    def count(self) -> Tensor:
        """[P] int64 on the CPU, not to be written to."""
        if self._count is None:
            return torch.zeros(self.sums.cells, dtype=torch.int64)
        return self._count[:].cpu()

    def add(self, expert: Tensor, weighted: Tensor, counted: Tensor) -> None:
        """The pairs of [T,K] slots: expert int64, g*n fp64, whether it counts."""
        if self._experts < 2:
            return
        K = expert.shape[1]
        first, second = torch.triu_indices(K, K, 1, device=self._device)
        # index_select, because on a CPU expert[:, first] always wakes other threads
        one, other = (expert.index_select(1, slot) for slot in (first, second))
        low, high = torch.minimum(one, other), torch.maximum(one, other)
        both = counted.index_select(1, first) & counted.index_select(1, second) & (low < high)
        product = weighted.index_select(1, first) * weighted.index_select(1, second)  # fp64
        cell = torch.where(both, high * (high - 1) // 2 + low, 0).flatten()
        product = torch.where(both, product, 0.0)
        self.live_count.index_add_(0, cell, both.flatten().long())
        self.sums.add(cell, product.flatten())

    def merge(self, other: Pairs) -> None:
        """Add those of `other`."""
        if self._count is None and isinstance(other._count, LazyRows):
            self._count = other._count
        elif other._count is not None:
            self.live_count.add_(other.count.to(self._device))
        self.sums.merge(other.sums)

    def square(self, triangle: Tensor, diagonal: Tensor) -> Tensor:
        """[P] and [E] as one symmetric [E,E]."""
        square = torch.diag(diagonal)
        high, low = torch.tril_indices(self._experts, self._experts, -1)
        square[high, low] = triangle
        square[low, high] = triangle
        return square
