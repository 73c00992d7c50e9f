"""Which sets of experts tokens chose together, counted: their coalitions.

Of many distinct sets a part is kept, by a rule that no order and no partition of the tokens can
change: at level l stay those whose hash, a number below 2**32 that depends on the set alone, is
below 2**(32-l), and the level is the least at which no more than `limit` sets stay. A set that is
kept at the end was kept all the time, so that its count is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any

import torch
from torch import Tensor

from reap.errors import ReapError
from reap.statistics.lazyrows import LazyRows

MOST_COALITIONS = 1 << 24  # of a layer
FIELDS = ("coalition_sets", "coalition_count", "coalition_about")  # of a file
HASH_BITS = 32
PENDING = 1 << 16  # rows at a time that are looked at together
_GROUPS_AT_ONCE = 1 << 21
_MOST_DENSE = 1 << 27  # cells of int64: 1 GB
_LOW = (1 << HASH_BITS) - 1


def check_coalitions(coalitions: int) -> None:
    """ReapError for what is no number of sets to keep."""
    if type(coalitions) is not int or not 0 <= coalitions <= MOST_COALITIONS:
        raise ReapError(
            f"coalitions is {coalitions!r}: it must be how many sets of experts to keep per layer, "
            f"a whole number of at most {MOST_COALITIONS:,}, or 0 for none"
        )


@dataclass(frozen=True)
class Coalitions:
    """Sets of experts that tokens of one layer chose, of `experts`, and how many tokens each.

    `sets` [N,w] int64: ascending ids, -1 behind those of a token with fewer than w; in ascending
    order of the rows, where -1 is the highest. `count` [N] int64. `tokens`: those that chose any
    expert, all of them. At `level` 0 these are all sets. At a higher level a set was kept with
    probability 2**-level, by its hash, so that a sum over sets times 2**level is an unbiased
    estimate of the same sum over all; counts of what was kept are exact, and `left_out` tokens
    chose a set that was not.
    """

    experts: int
    sets: Tensor
    count: Tensor
    level: int
    tokens: int

    @property
    def left_out(self) -> int:
        return self.tokens - int(self.count.sum())

    def groups(self, size: int) -> tuple[Tensor, Tensor]:
        """Groups of `size` different experts that some token chose together: [M,size] int64, ids
        ascending in each, rows ascending; and by how many tokens of the sets that were kept, [M]
        int64. Of size 2 these are the pairs, of size 3 the triplets (HodgeCover). ReapError for a
        size below 1, and for so large a one that a group of E experts has no number below 2**62."""
        if type(size) is not int or size < 1:
            raise ReapError(f"size is {size!r}: a group has a whole number of 1 or more experts")
        if size * math.log2(max(2, self.experts)) >= 62:
            raise ReapError(f"groups of {size} of {self.experts} experts are too many to number")
        width = self.sets.shape[1]
        code, total = self.count.new_zeros(0), self.count.new_zeros(0)
        each = max(1, math.comb(width, size))
        rows = max(1, _GROUPS_AT_ONCE // each)
        for start in range(0, len(self.sets) if size <= width else 0, rows):
            some, counts = self.sets[start : start + rows], self.count[start : start + rows]
            found, times = [code], [total]
            for columns in combinations(range(width), size):
                ids = some[:, list(columns)]
                real = ids[:, -1] >= 0
                number = torch.zeros_like(ids[:, 0])
                for column in ids.unbind(1):
                    number = number * self.experts + column
                found.append(number[real])
                times.append(counts[real])
            code, total = _summed(torch.cat(found), torch.cat(times))
        ids, rest = [], code
        for _ in range(size):
            ids.append(rest % self.experts)
            rest = rest // self.experts
        return torch.stack(ids[::-1], 1), total

    def dense(self, size: int) -> Tensor:
        """`groups` as [E, ...] int64 of `size` dimensions, symmetric: at ids in any order their
        count, 0 where one comes twice. ReapError for more than 2**27 cells."""
        if self.experts**size > _MOST_DENSE:
            raise ReapError(
                f"{self.experts}**{size} cells are more than {_MOST_DENSE:,}: use groups({size}), "
                "which has those alone that some token chose"
            )
        ids, count = self.groups(size)
        cells = torch.zeros((self.experts,) * size, dtype=torch.int64)
        for order in permutations(range(size)):
            cells[tuple(ids[:, place] for place in order)] = count
        return cells


class SetCounts:
    """Counts the sets of the tokens of one layer; keeps at most `limit` of them.

    Waits for a device once in 2**16 tokens. Memory: up to 4*K + 8 bytes per set that is kept, on
    the host, and 4*K bytes for each of the tokens that wait, on the device.
    """

    def __init__(self, experts: int, limit: int, device: torch.device) -> None:
        self.experts, self.limit, self._device = experts, limit, device
        # [N,w] int32, ascending, `experts` (in a file -1) where there is none, and their counts.
        self._sets: Tensor | LazyRows = torch.zeros(0, 0, dtype=torch.int32)
        self._count: Tensor | LazyRows = torch.zeros(0, dtype=torch.int64)
        self._level = self._seen = 0
        self._waiting: list[Tensor] = []  # [T,K] int32, ids as they come, `experts` for none
        self._rows = 0

    @classmethod
    def of(cls, experts: int, limit: int, state: Mapping[str, Tensor | LazyRows]) -> SetCounts:
        """From what `tensor` gave, by field, which nobody writes to any more."""
        self = cls(experts, limit, torch.device("cpu"))
        self._sets, self._count = state["coalition_sets"], state["coalition_count"]
        self._level, self._seen = state["coalition_about"][:].tolist()
        return self

    def __deepcopy__(self, memo: Any) -> SetCounts:
        """Shares all tensors: none is ever written to."""
        other = SetCounts(self.experts, self.limit, self._device)
        vars(other).update(vars(self) | {"_waiting": list(self._waiting)})
        return other

    @torch.no_grad()
    def add(self, expert: Tensor, mask: Tensor | None) -> None:
        """The tokens of [T,K] ids, of those where `mask` [T] is True; ids from `experts` on, and
        those that come again in one token, are left out."""
        if expert.numel() == 0:
            return
        real = (expert >= 0) & (expert < self.experts)
        if mask is not None:
            real &= mask.to(expert.device)[:, None]
        with torch.inference_mode(False):  # they outlive an inference mode
            rows = torch.where(real, expert, self.experts).to(torch.int32).clone()
            self._waiting.append(rows.to(self._device))
        self._rows += len(rows)
        if self._rows >= PENDING:
            self._settle()

    def merge(self, other: SetCounts) -> None:
        """Add those of `other`, which has the same limit."""
        other._settle()
        self._settle()
        if not self._seen:
            self._sets, self._count = other._sets, other._count
        elif other._seen:
            self._join(other._read(), other._count[:], other._level)
        self._level = max(self._level, other._level)
        self._seen += other._seen

    def read(self) -> Coalitions:
        sets = self.tensor("coalition_sets").long()
        return Coalitions(self.experts, sets, self._count[:].clone(), self._level, self._seen)

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Of `tensor`, by field: dtype and shape as in a file."""
        self._settle()
        N, width = self._sets.shape
        return dict(zip(FIELDS, (("I32", (N, width)), ("I64", (N,)), ("I64", (2,))), strict=True))

    def tensor(self, field: str) -> Tensor:
        """What a file stores, not to be written to: sets [N,w] int32, -1 for none, of which w is as
        much as one of them has; counts [N] int64; level and tokens with any expert [2] int64."""
        self._settle()
        if field == "coalition_about":
            return torch.tensor([self._level, self._seen])
        if field == "coalition_count":
            return self._count[:]
        sets = self._sets[:]
        return torch.where(sets == self.experts, -1, sets)

    def _read(self) -> Tensor:
        sets = self._sets[:]
        return torch.where(sets < 0, self.experts, sets)

    def _settle(self) -> None:
        """Take in what waits."""
        if not self._waiting:
            return
        waiting, self._waiting, self._rows = self._waiting, [], 0
        width = max(rows.shape[1] for rows in waiting)
        rows = torch.cat([_widened(rows, width, self.experts) for rows in waiting])
        rows = rows.sort(dim=1).values
        if width > 1:
            rows[:, 1:] = torch.where(rows[:, 1:] == rows[:, :-1], self.experts, rows[:, 1:])
            rows = rows.sort(dim=1).values
        rows = rows[rows[:, 0] < self.experts]
        seen = len(rows)
        rows = rows[self._kept(rows, self._level)]
        rows, count = self._tallied(rows, torch.ones_like(rows[:, 0], dtype=torch.int64))
        self._join(rows.cpu(), count.cpu(), self._level)
        self._seen += seen

    def _join(self, sets: Tensor, count: Tensor, level: int) -> None:
        """Add sets that were kept at `level`."""
        mine, level = self._read(), max(level, self._level)
        width = max(mine.shape[1], sets.shape[1])
        both = torch.cat([_widened(each, width, self.experts) for each in (mine, sets)])
        counts = torch.cat([self._count[:], count])
        kept = self._kept(both, level)
        both, counts = self._tallied(both[kept], counts[kept])
        while len(both) > self.limit and level < HASH_BITS:
            level += 1
            kept = self._kept(both, level)
            both, counts = both[kept], counts[kept]
        used = int((both < self.experts).any(0).sum())
        self._sets, self._count, self._level = both[:, :used].contiguous(), counts, level

    def _kept(self, rows: Tensor, level: int) -> Tensor:
        """[n] bool: which sets stay at `level`."""
        return set_hash(rows, self.experts) < 1 << (HASH_BITS - level)

    def _tallied(self, rows: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Distinct rows, ascending, and the sums of their counts."""
        if not len(rows):
            return rows, count
        order = torch.arange(len(rows), device=rows.device)
        words = list(_words(rows, self.experts))
        for word in reversed(words):
            order = order[word[order].argsort(stable=True)]
        new = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        new[1:] = False
        for word in words:
            ordered = word[order]
            new[1:] |= ordered[1:] != ordered[:-1]
        first = new.nonzero().flatten()
        ends = torch.cat([first[1:], first.new_tensor([len(rows)])]) - 1
        upto = count[order].cumsum(0)[ends]
        return rows[order][first], torch.diff(upto, prepend=upto.new_zeros(1))


def set_size(top_k: int) -> int:
    """Bytes of a set of so many experts and its count."""
    return 4 * top_k + 8


def set_hash(rows: Tensor, none: int) -> Tensor:
    """The hash [n] int64, below 2**32, of sets of ids [n,w], of which those that are `none` are no
    part. The order of the ids does not matter."""
    total = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for column in rows.unbind(1):
        total += torch.where(column == none, 0, _mixed(column.long() + 1))
    return _mixed(total & _LOW)


def _mixed(x: Tensor) -> Tensor:
    """Numbers below 2**32 stirred, one to one; multipliers below 2**31 keep products in int64."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x31848BAB), (14, 0x21F0AAAD)):
        x = ((x ^ (x >> shift)) * factor) & _LOW
    return x ^ (x >> 15)


def _words(rows: Tensor, experts: int) -> Iterator[Tensor]:
    """Columns of ids up to `experts` as few int64 in the same order."""
    bits = max(1, experts.bit_length())
    for columns in rows.long().split(63 // bits, dim=1):
        word = torch.zeros_like(columns[:, 0])
        for column in columns.unbind(1):
            word = word << bits | column
        yield word


def _widened(rows: Tensor, width: int, none: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]), value=none)


def _summed(codes: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct codes, ascending, and the sums of their counts."""
    distinct, place = codes.unique(return_inverse=True)
    return distinct, torch.zeros_like(distinct).index_add_(0, place, counts)


def contradiction(
    state: Mapping[str, Tensor], experts: int, limit: int, tokens: int, top_k: int
) -> str | None:
    """What in stored fields cannot come from so many tokens, or None."""
    sets, count = state["coalition_sets"].long(), state["coalition_count"]
    level, seen = state["coalition_about"].tolist()
    if not 0 <= level <= HASH_BITS or not 0 <= seen <= tokens:
        return "impossible numbers of coalitions"
    if len(sets) > limit or sets.shape[1] > top_k:
        return f"{len(sets)} coalitions of {sets.shape[1]}, more than {limit} of {top_k}"
    if (count < 1).any() or sum(count.tolist()) > seen or (level == 0 and int(count.sum()) != seen):
        return "impossible counts of coalitions"
    if ((sets < -1) | (sets >= experts)).any():
        return "a coalition with an id of no expert"
    rows = torch.where(sets < 0, experts, sets)
    if (rows.diff(dim=1) < 0).any() or ((rows.diff(dim=1) == 0) & (rows[:, 1:] < experts)).any():
        return "a coalition whose ids do not ascend"
    if sets.numel() and ((rows[:, 0] == experts).any() or not (rows < experts).any(0).all()):
        return "a coalition of no expert"
    if (set_hash(rows, experts) >= 1 << (HASH_BITS - level)).any():
        return "a coalition beyond its level"
    words = list(_words(rows, experts)) if sets.numel() else []
    above = torch.zeros(max(0, len(rows) - 1), dtype=torch.bool)
    for word in reversed(words):
        step = word.diff()
        above = (step > 0) | ((step == 0) & above)
    return None if above.all() else "coalitions out of order"
