"""Names of layers as people read them: without what all of a model share."""

from __future__ import annotations

from collections.abc import Sequence


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names of layers without the parts that all of them share."""
    first, last = _shared(names)
    return {
        name: ".".join(parts[first : len(parts) - last]) or name
        for name in names
        if (parts := name.split("."))
    }


def pattern(names: Sequence[str]) -> str:
    """The parts that they share, and N for the others."""
    first, last = _shared(names)
    parts = names[0].split(".")
    return ".".join([*parts[:first], "N", *parts[len(parts) - last :]])


def _shared(names: Sequence[str]) -> tuple[int, int]:
    """How many parts all names share at the beginning and at the end; of one, all around its
    number."""
    split = [name.split(".") for name in names]
    if len(split) == 1:  # as if there were another layer
        split.append(["" if part.isdigit() else part for part in split[0]])
    shortest = min(map(len, split))
    first = 0
    while first < shortest - 1 and len({parts[first] for parts in split}) == 1:
        first += 1
    last = 0
    while last < shortest - first - 1 and len({parts[-1 - last] for parts in split}) == 1:
        last += 1
    return first, last
