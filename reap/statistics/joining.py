"""The `data` of statistics that are added: an entry per run, and one for the shards of a run.

The entry of a shard is that of the whole run, which every shard reads alike, and "shard": the
"numbers" that it has of how many ("of"), and the "versions" that measured it. Shards of entries
that agree are joined into one; with all numbers there, that is the entry of a run in one piece.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from reap.errors import ReapError

Entry = dict[str, Any]
_TOLD = 5  # shards that a message names


def joined(entries: Iterable[Entry]) -> list[Entry]:
    """All entries, without repeats, in an order that no order of adding can change. ReapError for a
    shard that comes twice, and for one whose whole run is there too."""
    whole: set[str] = set()
    shards: dict[str, set[int]] = {}
    for entry in entries:
        numbers = numbers_of(entry)
        if numbers is None:
            whole.add(_text(entry))
            continue
        seen = shards.setdefault(_run_of(entry), set())
        twice = seen & numbers
        if twice:
            raise ReapError(f"{_named(twice, entry)} of one run would be added twice")
        seen |= numbers
    for run, numbers in shards.items():
        entry = json.loads(run)
        of = entry["shard"]["of"]
        rest = _text({name: value for name, value in entry.items() if name != "shard"})
        if rest in whole:
            raise ReapError(f"{_named(numbers, entry)} would be added to the run that has it")
        entry["shard"]["numbers"] = sorted(numbers)
        whole.add(rest if len(numbers) == of else _text(entry))
    return [json.loads(text) for text in sorted(whole)]


def check_whole(files: Iterable[tuple[str, list[Entry]]], *, missing: bool = False) -> None:
    """ReapError unless the shards in these files, (name, entries) each, are those of whole runs,
    each once; with `missing` some need not be there."""
    runs: dict[str, dict[int, str]] = {}
    one: dict[str, tuple[str, Entry]] = {}  # file and entry of each run
    for name, entries in files:
        for entry in entries:
            numbers = numbers_of(entry)
            if numbers is None:
                continue
            if "partial" in entry:
                raise ReapError(
                    f"{name} is what {_named(numbers, entry)} measured so far: let that end, its "
                    "command goes on from there"
                )
            run = _run_of(entry)
            one.setdefault(run, (name, entry))
            for number in numbers:
                other = runs.setdefault(run, {}).setdefault(number, name)
                if other is not name:
                    twice = _named({number}, entry)
                    raise ReapError(f"{other} and {name} both have {twice}: give it once")
    lacking = [run for run in runs if len(runs[run]) < one[run][1]["shard"]["of"]]
    if len(lacking) > 1:
        (first, mine), (second, theirs) = (one[run] for run in lacking[:2])
        what, was, now = next(differences(mine, theirs))
        raise ReapError(
            f"{first} and {second} are shards of different runs: {what} is {was}, and {now}"
        )
    if lacking and not missing:
        _, entry = one[lacking[0]]
        absent = set(range(entry["shard"]["of"])) - runs[lacking[0]].keys()
        verb = "is" if len(absent) == 1 else "are"
        raise ReapError(f"{_named(absent, entry)} {verb} missing: give all shards of the run")


def numbers_of(entry: Entry) -> set[int] | None:
    """Which shards of its run an entry has; None for a run in one piece. ReapError for what is
    none."""
    shard = entry.get("shard")
    if shard is None:
        return None
    fields = ("numbers", "of", "versions") if type(shard) is dict else ()
    if [type(shard.get(name, {})) for name in fields] == [list, int, dict]:
        numbers, of = shard["numbers"], shard["of"]
        whole = all(type(number) is int and 0 <= number < of for number in numbers)
        if numbers and whole and len({*numbers}) == len(numbers):
            return {*numbers}
    raise ReapError(f"shard {str(shard)[:80]} in the data of statistics is none: they are damaged")


def shards_said(entry: Entry) -> str | None:
    """An entry's shards in words; None for a run in one piece."""
    numbers = numbers_of(entry)
    return None if numbers is None else _named(numbers, entry)


def facts(entry: Entry) -> dict[str, Any]:
    """What an entry says, without levels, each under a name for a message."""
    found = {name: value for name, value in entry.items() if name not in ("sources", "shard")}
    shard = entry.get("shard") or {}
    found["the number of shards"] = shard.get("of", 1)
    found |= shard.get("versions") or {}
    sources = entry.get("sources")
    sources = sources if type(sources) is list else []
    found["the number of sources"] = len(sources)
    for source in sources:
        if type(source) is dict:
            spec = source.get("spec")
            found |= {f"{name} of data {spec!r}": value for name, value in source.items()}
    return found


def differences(mine: Entry, theirs: Entry) -> Iterator[tuple[str, Any, Any]]:
    """What two entries do not say alike: its name and both values."""
    ours, others = facts(mine), facts(theirs)
    for name in {**ours, **others}:
        if ours.get(name) != others.get(name):
            yield name, ours.get(name), others.get(name)


def _run_of(entry: Entry) -> str:
    """The same for all shards of a run."""
    shard = {name: value for name, value in entry["shard"].items() if name != "numbers"}
    return _text(entry | {"shard": shard})


def _text(entry: Entry) -> str:
    return json.dumps(entry, sort_keys=True)


def _named(numbers: set[int], entry: Entry) -> str:
    """Like "shards 3/8 and 5/8"."""
    shown = [f"{number}/{entry['shard']['of']}" for number in sorted(numbers)[:_TOLD]]
    if len(numbers) > _TOLD:
        shown.append(f"{len(numbers) - _TOLD:,} more")
    *most, last = shown
    return f"shards {', '.join(most)} and {last}" if most else f"shard {last}"
