"""Sizes and numbers as people read them."""

from collections.abc import Iterable


def sized(count: int) -> str:
    """A number of bytes in the unit that suits it."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} bytes"


def runs_of(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending numbers as runs: the first and the last number of each."""
    runs: list[tuple[int, int]] = []
    for one in numbers:
        if runs and one == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], one
        else:
            runs.append((one, one))
    return runs
