"""Lines of a card on what was kept and which text decided it, from the record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from reap.files.units import runs_of


def calibration_lines(calibration: Mapping[str, Any]) -> list[str]:
    """The sources with their tokens and shares of all; [] where the statistics name none. What a
    calibration says is free-form, so nothing is taken for granted."""
    rows = list(_sources(calibration.get("data")))
    total = sum(tokens for _, _, tokens in rows)
    if not total:
        return []
    table = [
        f"| {cell(spec)} | {cell(domain)} | {tokens:,} | {tokens / total:.1%} |"
        for spec, domain, tokens in rows
    ]
    return ["| source | domain | tokens | share |", "|---|---|---|---|", *table]


def sources_of(about: Mapping[str, Any]) -> str:
    """In a phrase: the sources of a text."""
    return ", ".join(cell(spec) for spec, _, _ in _sources([about])) or "text that is not named"


def _sources(data: Any) -> Iterator[tuple[str, str, int]]:
    for entry in data if isinstance(data, list) else ():
        sources = entry.get("sources") if isinstance(entry, dict) else None
        for one in sources if isinstance(sources, list) else ():
            tokens = one.get("counted", one.get("tokens")) if isinstance(one, dict) else None
            if type(tokens) is int:
                yield str(one.get("spec")), str(one.get("domain")), tokens


def ids(numbers: Iterable[int]) -> str:
    """Ascending ids with runs joined, like "1, 3-5"."""
    runs = runs_of(numbers)
    return ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in runs)


def cell(text: str) -> str:
    """Text of others as code in a cell of a table, on one line."""
    return "`" + " ".join(text.replace("`", "'").replace("|", "\\|").split()) + "`"
