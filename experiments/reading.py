"""Raw results as numbers: cells of a model, differences over seeds, what may be said of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from math import isnan
from operator import getitem
from typing import Any

from experiments.measures import Interval, over_seeds

Data = dict[str, Any]
AGREES, AGAINST, OPEN = "agrees", "contradicts", "not separated"
PAPER, OURS = "paper", "ours"  # whose claim it is


def models(data: Data) -> list[str]:
    return data["setting"]["models"]


def cells(data: Data, model: str) -> list[Any]:
    """A model's cells in the order of their keys."""
    keys = [key for key in data["cells"] if key.startswith(f"{model}/")]
    return [data["cells"][key] for key in sorted(keys, key=lambda key: (len(key), key))]


def interval(found: Sequence[Any], value: Callable[[Any], float]) -> Interval:
    """Over cells, that is over seeds."""
    return over_seeds([value(cell) for cell in found])


def at(found: Sequence[Any], *path: str) -> Interval:
    """Of the number that every cell has there."""
    return interval(found, lambda cell: reduce(getitem, path, cell))


def claim(text: str, whose: str, model: str, difference: Interval) -> list[str]:
    """A line of the table of claims."""
    return [text, whose, model, between(difference), verdict(difference)]


def verdict(difference: Interval) -> str:
    """Of a claim that the first of two loses less: `difference` is the first less the second."""
    if not difference.excludes_zero:
        return OPEN
    return AGREES if difference.middle < 0 else AGAINST


def shown(value: Interval, digits: int = 3, signed: bool = True) -> str:
    """The mean and half the width of its interval, where there is one."""
    told = f"{value.middle:{'+' if signed else ''}.{digits}f}"
    return told if isnan(value.high) else f"{told} ± {value.high - value.middle:.{digits}f}"


def between(value: Interval, digits: int = 3) -> str:
    """The mean and its interval, where there is one."""
    told = f"{value.middle:+.{digits}f}"
    if isnan(value.high):
        return told
    return f"{told} ({value.low:+.{digits}f} to {value.high:+.{digits}f})"


def percent(value: Interval) -> str:
    """A share and its interval."""
    return f"{value.middle:.1%} ({value.low:.1%} to {value.high:.1%})"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---"] * len(head)
    return [f"| {' | '.join(line)} |" for line in (head, rule, *lines)] + [""]
