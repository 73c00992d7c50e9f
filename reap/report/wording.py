"""Names and numbers as a page shows them."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from reap.files.units import runs_of

LONG = 120
_CONTROLS = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # of Unicode: what has no shape of its own


def plain(text: Any, limit: int = LONG) -> str:
    """Of anything, text for one line: what would change the text around it (controls, direction,
    halves of characters) as U+FFFD, and of a long one its two ends."""
    shown = "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(letter) in _CONTROLS else letter
        for letter in re.sub(r"\s+", " ", str(text)[: 16 * limit])
    )
    if len(shown) <= limit:
        return shown
    half = (limit - 1) // 2
    return f"{shown[: limit - 1 - half]}\N{HORIZONTAL ELLIPSIS}{shown[-half:]}"


def distinct(names: Iterable[Any], limit: int = LONG) -> list[str]:
    """`plain` of each name; what would then look like one before it is numbered."""
    found: dict[str, None] = {}
    for name in names:
        shown = short = plain(name, limit)
        number_of = 1
        while shown in found:
            number_of += 1
            shown = f"{short} ({number_of})"
        found[shown] = None
    return list(found)


def number(value: float | None, digits: int = 3) -> str:
    """With so many significant digits; a dash for what there is not."""
    if value is None or math.isnan(value):
        return "\N{EN DASH}"
    if math.isinf(value):
        return "\N{INFINITY}" if value > 0 else "\N{MINUS SIGN}\N{INFINITY}"
    if abs(value) < 1e15 and (value == round(value) or abs(value) >= 10**digits):
        return f"{value:,.0f}".replace("-", "\N{MINUS SIGN}")
    return f"{value:.{digits}g}".replace("-", "\N{MINUS SIGN}")


def signed(value: float | None, digits: int = 3) -> str:
    shown = number(value, digits)
    return f"+{shown}" if value is not None and value > 0 else shown


def share(value: float | None) -> str:
    """As a percentage."""
    if value is None or math.isnan(value):
        return "\N{EN DASH}"
    return f"{value:.0%}"


def ranges(numbers: Iterable[int], most: int = 40) -> str:
    """Ascending numbers with runs joined, like "1, 3 to 5"; of many the first runs."""
    runs = runs_of(numbers)
    shown = [
        str(low) if low == high else f"{low}{', ' if high == low + 1 else ' to '}{high}"
        for low, high in runs[:most]
    ]
    left = sum(high - low + 1 for low, high in runs[most:])
    return ", ".join([*shown, f"{left:,} more"] if left else shown) or "none"


def letter(place: int) -> str:
    """A, B, ..., Z, AA, ... for 0 and up."""
    name = ""
    place += 1
    while place:
        place, rest = divmod(place - 1, 26)
        name = chr(ord("A") + rest) + name
    return name
