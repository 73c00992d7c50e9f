"""Where a run that ends when it is sure reads its sums, and where it looks (`reap.runs.stability`):
by the number of batches alone."""

from __future__ import annotations

from collections.abc import Iterator

GROUPS = 32  # the fewest; twice as many are halved
LOOKS = (32, 40, 48, 56)
WAVES = (32, 48)  # of these, where a wave has to end


def group_size(batches: int) -> int:
    """How many batches a group has when there are so many in all."""
    return 1 << max(0, (batches // GROUPS).bit_length() - 1)


def cuts_between(first: int, last: int) -> Iterator[int]:
    """Where sums are read: numbers of batches above `first`, up to `last`."""
    return (n for n in range(first + 1, last + 1) if n % group_size(n) == 0)


def next_cut(batches: int) -> int:
    """The first cut at or above `batches`, which are at least 1."""
    size = group_size(batches)
    return -(-batches // size) * size


def next_look(batches: int, looks: tuple[int, ...] = LOOKS) -> int:
    """The first number of batches above `batches` that gives as many groups as one of `looks`."""
    size = group_size(batches)
    return next(n for n in (*(size * look for look in looks), 2 * GROUPS * size) if n > batches)
