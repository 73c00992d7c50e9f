"""Sizes and numbers as people read them."""

from collections.abc import Iterable


def sized(count: int) -> str:
    """A number of bytes in the unit that suits it."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} bytes"


def counted(amount: int, noun: str) -> str:
    """Like "1 expert" and "2,000 experts"."""
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def spanned(amounts: Iterable[int], noun: str) -> str:
    """The least and the most of them: "1 expert" where these are the same, or "1 to 4 experts"."""
    low, high = min(found := list(amounts)), max(found)
    return counted(high, noun) if low == high else f"{low:,} to {counted(high, noun)}"


def runs_of(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending numbers as runs: the first and the last number of each."""
    runs: list[tuple[int, int]] = []
    for one in numbers:
        if runs and one == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], one
        else:
            runs.append((one, one))
    return runs
