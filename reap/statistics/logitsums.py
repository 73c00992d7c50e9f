"""Sums over tokens of products of router logits, l_i * l_j, and of the logits themselves.

They are exact sums of logits rounded to multiples of 2**-18. A rounded logit is cut into two
integers of 15 bits; matrix products of such integers over up to 2**15 tokens are exact in fp64,
whatever the order of their additions and the number of threads. So every order and every partition
of the tokens gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reap.errors import ReapError
from reap.statistics.fixed import FixedSum
from reap.statistics.fixed import contradiction as of_fixed
from reap.statistics.lazyrows import LazyRows

FIELD = "logit_products"  # of a file
LIMIT = 2.0**12  # of a logit
_UNIT = 2.0**-18
_PART = 2.0**15
_TOKENS = 1 << 15  # at a time: 2**15 products below 2**30 are below 2**53


def cells(experts: int) -> int:
    """Of the sums: the triangle i <= j of E logits and a one, (i, j) at j*(j+1)/2 + i."""
    return (experts + 1) * (experts + 2) // 2


class LogitSums:
    """Of one layer. A call that does not bring logits makes them unknown from then on.

    Memory: 16 bytes per pair of experts, (E+1)*(E+2)/2 of them.
    """

    def __init__(self, experts: int, device: torch.device) -> None:
        self._experts, self._device = experts, device
        self._sum = FixedSum((cells(experts),), device)
        self.lost = False
        with torch.inference_mode(False):  # they outlive an inference mode
            # Experts with a logit that could not be added. Kept on the device, as faults of slots.
            self.faulty = torch.zeros(experts, dtype=torch.bool, device=device)

    @classmethod
    def of(cls, experts: int, stored: Tensor | LazyRows | None) -> LogitSums:
        """From what `tensor` gave, which nobody writes to any more; None: unknown."""
        self = cls(experts, torch.device("cpu"))
        if stored is None:
            self.lose()
        else:
            self._sum = FixedSum.from_canonical(stored, (cells(experts),))
        return self

    def lose(self) -> None:
        """They are unknown from now on."""
        self.lost = True
        self._sum = FixedSum((cells(self._experts),), self._device)

    @torch.no_grad()
    def add(self, name: str, logits: Tensor | None, mask: Tensor | None) -> None:
        """Those [T,E] of the tokens where `mask` [T] is True. One that is NaN, infinite or too
        large counts as zero; `check` then says so. ReapError for another shape."""
        if self.lost:
            return
        if logits is None:
            self.lose()
            return
        if logits.dim() != 2 or logits.shape[1] != self._experts:
            raise ReapError(
                f"layer {name}: logits are {list(logits.shape)}: they must be [tokens, "
                f"{self._experts}]"
            )
        for start in range(0, len(logits), _TOKENS):
            some = slice(start, start + _TOKENS)
            here = None if mask is None else mask[some].to(self._device)
            self._add(logits[some].to(self._device).double(), here)

    def _add(self, logits: Tensor, mask: Tensor | None) -> None:
        one = torch.ones_like(logits[:, :1])
        if mask is not None:
            logits = torch.where(mask[:, None], logits, 0)
            one = mask[:, None].double()
        bad = ~(logits.abs() < LIMIT)  # NaN is none below it
        self.faulty |= bad.any(0)
        logits = torch.where(bad, 0, logits)
        units = torch.cat([logits, one], 1).div_(_UNIT).round_()  # integers below 2**30
        high = units.div(_PART).floor_()
        low = units - high * _PART
        i, j = _triangle(self._experts, self._device)
        cross = high.T @ low
        for product, weight in (
            (high.T @ high, _PART * _PART),
            (cross + cross.T, _PART),
            (low.T @ low, 1.0),
        ):
            self._sum.add(product[i, j] * (weight * _UNIT * _UNIT))

    def check(self, name: str) -> None:
        """ReapError naming the layer and the expert if a logit so far could not be added."""
        for expert in self.faulty.nonzero().flatten().tolist():
            raise ReapError(
                f"layer {name}, expert {expert}: a logit of the router is NaN, infinite or not "
                f"below {LIMIT:.0f}: check the model's weights and dtype"
            )

    def merge(self, other: LogitSums) -> None:
        if other.lost:
            self.lose()
        elif not self.lost:
            self._sum.merge(other._sum)

    def read(self) -> Tensor | None:
        """[E+1,E+1] fp64 on the CPU, symmetric, of the logits and a one; None where unknown."""
        if self.lost:
            return None
        i, j = _triangle(self._experts, torch.device("cpu"))
        square = torch.zeros(self._experts + 1, self._experts + 1, dtype=torch.float64)
        square[i, j] = square[j, i] = self._sum.read()
        return square

    def tensor(self) -> Tensor:
        """[C,2] int64, wholes and fractions in units of 2**-62; not to be written to."""
        return self._sum.canonical()


def contradiction(stored: Mapping[str, Tensor | LazyRows], tokens: int) -> str | None:
    """What in a stored field cannot come from so many tokens, or None."""
    last = stored[FIELD][len(stored[FIELD]) - 1 : len(stored[FIELD])]
    if last.tolist() != [[tokens, 0]]:
        return f"{FIELD} are of other than its tokens"
    fault = of_fixed(stored[FIELD][:])
    return f"{FIELD} has {fault}" if fault else None


def _triangle(experts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """i and j of the cells, in their order."""
    j, i = torch.tril_indices(experts + 1, experts + 1, device=device)
    return i, j
