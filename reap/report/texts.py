"""What statistics say of the text that they are of. They may say anything: what is not as `reap
calibrate` writes it is left out, not believed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from reap.report.wording import plain
from reap.statistics.joining import shards_said
from reap.text.counted import said

_COUNTS = ("rows", "cut", "empty", "repeated", "bad", "uncounted")


@dataclass(frozen=True)
class Source:
    """One of the sources of a calibration; None for what it does not say."""

    spec: str
    domain: str
    tokens: int | None
    counted: int | None
    weight: float | None
    counts: dict[str, int | None]  # of rows, and of what was done to them
    digest: str


@dataclass(frozen=True)
class Run:
    """One calibration: how it read the text, in words, and its sources."""

    facts: dict[str, str]
    sources: list[Source]


def runs(data: list[dict[str, Any]]) -> list[Run]:
    """Of the `data` of statistics, in its order."""
    return [Run(dict(_facts(entry)), list(_sources(entry))) for entry in data]


def _facts(entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "partial" in entry:
        yield "unfinished", "this is what a calibration measured so far"
    shards = shards_said(dict(entry))
    if shards:
        yield "only", shards
    tokens, counted = whole(entry.get("tokens")), whole(entry.get("counted"))
    if tokens is not None:
        yield "tokens", f"{tokens:,}"
    if counted is not None and counted != tokens:
        yield "counted", f"{counted:,}"
    if entry.get("count") is not None:
        yield "which tokens count", plain(said(entry["count"]))
    for name in ("seq_len", "batch_size", "max_tokens", "max_tokens_per_source", "seed"):
        if (value := whole(entry.get(name))) is not None:
            yield name.replace("_", " "), f"{value:,}"
    if type(entry.get("packing")) is bool:
        yield "rows", "packed" if entry["packing"] else "a sample each"
    if "ended" in entry:
        yield "ended", plain(entry["ended"], 300)
    run = entry.get("run")
    if isinstance(run, dict):
        yield from ((plain(name, 30), plain(value)) for name, value in sorted(run.items()))


def _sources(entry: Mapping[str, Any]) -> Iterator[Source]:
    found = entry.get("sources")
    for source in found if isinstance(found, list) else ():
        if not isinstance(source, dict):
            continue
        weight = source.get("weight")
        yield Source(
            plain(source.get("spec", "unnamed")),
            plain(source.get("domain", "")),
            whole(source.get("tokens")),
            whole(source.get("counted")),
            weight if type(weight) is float else whole(weight),
            {name: whole(source.get(name)) for name in _COUNTS},
            plain(source.get("sha256", ""), 64),
        )


def whole(value: Any) -> int | None:
    """A number of tokens or rows, as far as there can be so many; None for anything else."""
    return value if type(value) is int and 0 <= value < 2**63 else None
