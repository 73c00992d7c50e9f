"""Sums without rounding error, so that order and partition never show.

A cell is one signed fixed-point number of 20 limbs of 32 bits: limb i weighs 2**(32*i - 320). An
fp64 addend is a 53-bit integer times a power of two, so it touches at most three neighbouring
limbs. Limbs live in int64 and are added as integers, which commute: any order and any partition of
the addends over calls, threads or machines gives the same bits. A sum is rounded once, when it is
read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reap.errors import ReapError

LIMBS = 20
LIMB_BITS = 32
FRACTION_BITS = 320
LIMIT = 2.0**288  # leaves the top limb to carries and the sign: room for 2**31 such addends

_LOW = (1 << LIMB_BITS) - 1
_MANTISSA_BITS = 53
# One addend moves a limb by less than 2**33, so this many keep it well inside int64.
MAX_PENDING = 1 << 28
_CPU_CHUNK = 1 << 14  # addends at a time whose temporaries stay in the cache


def in_range(values: Tensor) -> Tensor:
    """Whether each fp64 value can be an addend: finite, magnitude below 2**288. [...] bool."""
    return values.abs() < LIMIT  # False for NaN


class ExactSum:
    """`cells` exact sums of fp64 addends, on one device.

    Bits of an addend below 2**-320 are dropped, before it is added, so that they never depend on
    its neighbours. The product of two fp32 numbers, subnormals included, has none.
    """

    def __init__(self, cells: int, device: torch.device | str = "cpu") -> None:
        self._limbs = torch.zeros(LIMBS, cells, dtype=torch.int64, device=device)  # [20,C] int64
        self._pending = 0  # addends since the last carry

    def add(self, cell: Tensor, values: Tensor) -> None:
        """Add `values` [N] fp64, all `in_range`, to the sums numbered `cell` [N] int64.

        Does not wait for the device. A value out of range is the caller's to find: here it would
        corrupt the sums.
        """
        cells = self._limbs.shape[1]
        flat = self._limbs.view(-1)
        chunk = _CPU_CHUNK if flat.device.type == "cpu" else MAX_PENDING
        for part, addends in zip(cell.split(chunk), values.split(chunk), strict=True):
            if self._pending + len(part) > MAX_PENDING:
                self._carry()
            self._pending += len(part)
            limb, low, middle, high = _split(addends)
            place = limb * cells + part
            flat.index_add_(0, place, low)
            flat.index_add_(0, place + cells, middle)
            flat.index_add_(0, place + 2 * cells, high)

    def limbs(self, addends: int) -> Tensor:
        """The limbs themselves [20,C] int64, for a kernel that adds to them as `add` does: at most
        `addends` to each sum. ReapError for more than 2**28."""
        if addends > MAX_PENDING:
            raise ReapError(f"{addends} addends at once: pass fewer tokens at a time")
        if self._pending + addends > MAX_PENDING:
            self._carry()
        self._pending += addends
        return self._limbs

    def merge(self, other: ExactSum) -> None:
        """Add the sums of `other`, cell by cell."""
        self._carry()
        other._carry()
        self._limbs += other._limbs.to(self._limbs.device)
        self._pending = 1  # two carried limbs are below 2**33 together, as after one addend

    def canonical(self) -> Tensor:
        """The one representation of these sums, for files and comparisons. [C,20] int32 on the CPU.

        Each row is a little-endian two's complement integer in units of 2**-320.
        ReapError when a sum has outgrown 2**319.
        """
        self._carry()
        limbs = self._limbs.cpu()
        top = limbs[-1]
        if ((top < -(1 << 31)) | (top >= 1 << 31)).any():
            raise ReapError("a sum of statistics exceeds 2**319: the norms cannot be real")
        signed = torch.where(limbs >= 1 << 31, limbs - (1 << 32), limbs)
        return signed.to(torch.int32).T.contiguous()

    @classmethod
    def from_canonical(cls, rows: Tensor) -> ExactSum:
        """The sums whose `canonical()` is `rows` [C,20] int32."""
        total = cls(0)
        total._limbs = rows.T.contiguous().to(torch.int64)
        total._limbs[:-1] &= _LOW
        return total

    def integers(self, cells: slice = slice(None)) -> list[int]:
        """The exact sums as integers in units of 2**-320."""
        data = self.canonical()[cells].numpy().astype("<i4").tobytes()
        width = LIMBS * LIMB_BITS // 8
        rows = (data[start : start + width] for start in range(0, len(data), width))
        return [int.from_bytes(row, "little", signed=True) for row in rows]

    def read(self, cells: slice = slice(None)) -> Tensor:
        """The sums, each correctly rounded to the nearest fp64. [C] fp64 on the CPU."""
        unit = 1 << FRACTION_BITS
        # Python divides integers with one correct rounding, whatever their size.
        return torch.tensor([total / unit for total in self.integers(cells)], dtype=torch.float64)

    def _carry(self) -> None:
        """Bring every limb but the top one into [0, 2**32)."""
        for limb, above in zip(self._limbs[:-1], self._limbs[1:], strict=True):
            above += limb >> LIMB_BITS
            limb &= _LOW
        self._pending = 0


def _split(values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fp64 values as (limb, low, middle, high), the amounts for limbs `limb`, `limb+1`, `limb+2`.

    value = (low + middle * 2**32 + high * 2**64) * 2**(32*limb - 320), each [N] int64 and under
    2**33 in magnitude. Right shifts of negative integers round down, which keeps this exact.
    """
    mantissa, exponent = torch.frexp(values)
    integer = (mantissa * 2.0**_MANTISSA_BITS).to(torch.int64)
    position = exponent.to(torch.int64) + (FRACTION_BITS - _MANTISSA_BITS)  # of the lowest bit
    integer >>= (-position).clamp_(0, 63)
    position.clamp_(min=0)
    shift = position & (LIMB_BITS - 1)
    below = (integer & _LOW) << shift  # 63 bits
    above = (integer >> LIMB_BITS) << shift  # 53 bits, signed
    return (
        position >> 5,
        below & _LOW,
        (below >> LIMB_BITS) + (above & _LOW),
        above >> LIMB_BITS,
    )
