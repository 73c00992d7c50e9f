"""Sums in fixed point, 16 bytes each, for the many cells of vectors per expert.

A cell is whole + fraction * 2**-62, two int64 with 0 <= fraction < 2**62. An addend loses its bits
below 2**-62 (2e-19) before it is added, on its own; integers then commute, so that any order and
any partition of the addends give the same bits, as in `exact`, which keeps all bits for ten times
the memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reap.statistics.lazyrows import LazyRows

FRACTION_BITS = 62
LIMIT = 2.0**44  # of an addend: 2**18 of the largest fit
_ONE = 1 << FRACTION_BITS
_CHUNK = 1 << 14  # cells at a time whose temporaries stay in a CPU's cache


class FixedSum:
    """Sums [E, ...] of fp32 or fp64 addends, on one device."""

    def __init__(self, shape: tuple[int, ...], device: torch.device | str) -> None:
        self.shape, self.device = shape, torch.device(device)
        self._stored: LazyRows | None = None  # as in `canonical`, in a file
        self._whole: Tensor | None = None
        self._fraction: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Add one value per cell, all of magnitude below LIMIT. Does not wait for the device."""
        whole, fraction = (part.view(-1) for part in self._parts())
        addends = values.to(self.device).reshape(-1)
        chunk = _CHUNK if self.device.type == "cpu" else max(1, len(addends))
        for start in range(0, len(addends), chunk):
            some = slice(start, start + chunk)
            _add(whole[some], fraction[some], addends[some])

    def merge(self, other: FixedSum) -> None:
        """Add the sums of `other`, of this shape."""
        if other._stored is None and other._whole is None:
            return
        if self._stored is None and self._whole is None and other._stored is not None:
            self._stored = other._stored
            return
        whole, fraction = self._parts()
        theirs = [part.to(self.device) for part in other._read_parts()]
        _carry(whole, fraction, *theirs)

    def canonical(self) -> Tensor:
        """[E, 2, ...] int64 on the CPU: whole and fraction of each, as a file stores it. Not to be
        written to."""
        if self._whole is None and self._stored is not None:
            return self._stored[:]
        return torch.stack(self._read_parts(), 1)

    @classmethod
    def from_canonical(cls, stored: Tensor | LazyRows, shape: tuple[int, ...]) -> FixedSum:
        """The sums of `shape` whose `canonical()` is `stored`, which nobody writes to any more."""
        self = cls(shape, "cpu")
        if isinstance(stored, LazyRows):
            self._stored = stored
        else:
            self._whole, self._fraction = (part.clone() for part in stored.unbind(1))
        return self

    def read(self) -> Tensor:
        """The sums in fp64, off by at most two roundings, on the CPU."""
        whole, fraction = self._read_parts()
        # To the nearest whole number: a small negative sum is not the difference of large ones.
        above = fraction >= _ONE // 2
        fraction = torch.where(above, fraction - _ONE, fraction)
        return (whole + above).double() + fraction.double() * 2.0**-FRACTION_BITS

    def _parts(self) -> tuple[Tensor, Tensor]:
        """Whole and fraction on the device, which may be added to."""
        if self._whole is None or self._fraction is None:
            with torch.inference_mode(False):  # sums outlive a mode that they may be made in
                parts = (part.to(self.device) for part in self._read_parts())
                self._whole, self._fraction = parts
            self._stored = None
        return self._whole, self._fraction

    def _read_parts(self) -> tuple[Tensor, Tensor]:
        """Whole and fraction on the CPU, not to be written to but by who reads them first."""
        if self._whole is not None and self._fraction is not None:
            return self._whole.cpu(), self._fraction.cpu()
        if self._stored is not None:
            whole, fraction = self._stored[:].unbind(1)
            return whole.contiguous(), fraction.contiguous()
        zeros = torch.zeros(2, *self.shape, dtype=torch.int64)
        return zeros[0], zeros[1]


def contradiction(stored: Tensor) -> str | None:
    """What in canonical sums [E, 2, ...] cannot be, or None."""
    fraction = stored[:, 1]
    if ((fraction < 0) | (fraction >= _ONE)).any():
        return "a fraction beyond one"
    return None


def _add(whole: Tensor, fraction: Tensor, addends: Tensor) -> None:
    wide = addends.double()
    units = wide.trunc()
    wide = (wide - units).mul_(float(_ONE))  # exact, and shorter than 53 bits
    _carry(whole, fraction, units.long(), wide.long())


def _carry(whole: Tensor, fraction: Tensor, units: Tensor, rest: Tensor) -> None:
    """Add whole numbers, and fractions between -1 and 1, to canonical ones."""
    fraction += rest
    whole += units
    whole += fraction >> FRACTION_BITS
    fraction &= _ONE - 1
