"""Sums without rounding error, so that order and partition never show.

A cell is one signed fixed-point number of 20 limbs of 32 bits: limb i weighs 2**(32*i - 320). An
fp64 addend is a 53-bit integer times a power of two, so it touches at most three neighbouring
limbs. Limbs live in int64 and are added as integers, which commute: any order and any partition of
the addends over calls, threads or machines gives the same bits. A sum is rounded once, when it is
read.
"""

from __future__ import annotations

from typing import Protocol

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
_SETTLED_CHUNK = 1 << 12  # cells at a time that are not added to any more


class Rows(Protocol):
    """Canonical sums [C,20] int32, as a tensor or where they are read from."""

    def __len__(self) -> int: ...

    def __getitem__(self, cells: slice) -> Tensor: ...


def in_range(values: Tensor) -> Tensor:
    """Whether each fp64 value can be an addend: finite, magnitude below 2**288. [...] bool."""
    return values.abs() < LIMIT  # False for NaN


class ExactSum:
    """`cells` exact sums of fp64 addends, on one device.

    Bits of an addend below 2**-320 are dropped, before it is added, so that they never depend on
    its neighbours. The product of two fp32 numbers, subnormals included, has none.
    """

    def __init__(self, cells: int, device: torch.device | str = "cpu") -> None:
        self.cells = cells
        self._device = torch.device(device)
        # The sums are in `_live`, or where nothing was added since they were read, in `_rows`, of
        # half the size and perhaps still in a file. In neither: they are zero.
        self._live: Tensor | None = None  # [20,C] int64
        self._rows: Rows | None = None
        self._pending = 0  # addends since the last carry

    def add(self, cell: Tensor, values: Tensor) -> None:
        """Add `values` [N] fp64, all `in_range`, to the sums numbered `cell` [N] int64.

        Does not wait for the device. A value out of range is the caller's to find: here it would
        corrupt the sums.
        """
        cells = self.cells
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

    @property
    def _limbs(self) -> Tensor:
        """[20,C] int64, which may be added to."""
        if self._live is None:
            with torch.inference_mode(False):  # sums outlive a mode that they may be made in
                if self._rows is None:
                    zeros = torch.zeros(LIMBS, self.cells, dtype=torch.int64, device=self._device)
                    self._live = zeros
                else:
                    self._live = _limbs_of(self._rows[:]).to(self._device)
            self._rows, self._pending = None, 0
        return self._live

    def merge(self, other: ExactSum) -> None:
        """Add the sums of `other`, cell by cell. What nothing was added to is read, or shared, and
        the sum of two such is of their kind."""
        if other._live is None and other._rows is None:
            return
        if self._live is None and other._live is None and other._rows is not None:
            self._rows = other._rows if self._rows is None else _added(self._rows, other._rows)
            return
        self._carry()
        if other._live is None:
            self._limbs.add_(_limbs_of(other.canonical()).to(self._device))
        else:
            other._carry()
            self._limbs.add_(other._live.to(self._device))
        self._pending = 1  # two carried limbs are below 2**33 together, as after one addend

    def canonical(self, cells: slice = slice(None)) -> Tensor:
        """The one representation of these sums, for files and comparisons, which may be shared: not
        to be written to. [C,20] int32 on the CPU.

        Each row is a little-endian two's complement integer in units of 2**-320.
        ReapError when a sum has outgrown 2**319.
        """
        if self._live is not None:
            self._carry()
            return _rows_of(self._live[:, cells].cpu())
        if self._rows is not None:
            return self._rows[cells]
        return torch.zeros(len(range(*cells.indices(self.cells))), LIMBS, dtype=torch.int32)

    @classmethod
    def from_canonical(cls, rows: Rows) -> ExactSum:
        """The sums whose `canonical()` is `rows` [C,20] int32, which nobody writes to any more."""
        total = cls(len(rows))
        total._rows = rows
        return total

    def integers(self, cells: slice = slice(None)) -> list[int]:
        """The exact sums as integers in units of 2**-320."""
        data = self.canonical(cells).numpy().astype("<i4").tobytes()
        width = LIMBS * LIMB_BITS // 8
        rows = (data[start : start + width] for start in range(0, len(data), width))
        return [int.from_bytes(row, "little", signed=True) for row in rows]

    def read(self, cells: slice = slice(None)) -> Tensor:
        """The sums, each correctly rounded to the nearest fp64. [C] fp64 on the CPU."""
        unit = 1 << FRACTION_BITS
        # Python divides integers with one correct rounding, whatever their size.
        return torch.tensor([total / unit for total in self.integers(cells)], dtype=torch.float64)

    def _carry(self) -> None:
        _carry(self._limbs)
        self._pending = 0


def _limbs_of(rows: Tensor) -> Tensor:
    """[C,20] int32 as carried limbs [20,C] int64."""
    limbs = rows.T.contiguous().to(torch.int64)
    limbs[:-1] &= _LOW
    return limbs


def _rows_of(limbs: Tensor) -> Tensor:
    """Carried limbs [20,C] int64 as [C,20] int32."""
    top = limbs[-1]
    if ((top < -(1 << 31)) | (top >= 1 << 31)).any():
        raise ReapError("a sum of statistics exceeds 2**319: the norms cannot be real")
    signed = torch.where(limbs >= 1 << 31, limbs - (1 << 32), limbs)
    return signed.to(torch.int32).T.contiguous()


def _added(mine: Rows, theirs: Rows) -> Tensor:
    """The canonical sum of two, a piece at a time."""
    total = torch.empty(len(mine), LIMBS, dtype=torch.int32)
    for start in range(0, len(mine), _SETTLED_CHUNK):
        some = slice(start, start + _SETTLED_CHUNK)
        limbs = _limbs_of(mine[some]) + _limbs_of(theirs[some])
        _carry(limbs)
        total[some] = _rows_of(limbs)
    return total


def _carry(limbs: Tensor) -> None:
    """Bring every limb [20,C] but the top one into [0, 2**32)."""
    for limb, above in zip(limbs[:-1], limbs[1:], strict=True):
        above += limb >> LIMB_BITS
        limb &= _LOW


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
