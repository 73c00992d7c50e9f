"""Shards of one run become that run, in any order; others are named."""

from __future__ import annotations

import random
from typing import Any

import pytest

from reap.errors import ReapError
from reap.statistics.joining import check_whole, differences, joined, numbers_of, shards_said

SOURCE = {"spec": "a.txt", "sha256": "12ab", "rows": 3}
RUN: dict[str, Any] = {"seq_len": 16, "run": {"dtype": "float32"}, "sources": [SOURCE]}


def shard(*numbers: int, of: int = 4, torch: str = "2.13", **other: Any) -> dict[str, Any]:
    about = {"numbers": list(numbers), "of": of, "versions": {"torch": torch}}
    return RUN | other | {"shard": about}


def test_all_shards_are_the_run() -> None:
    other = {"spec": "b.txt"}
    for seed in range(20):
        parts = [shard(0), shard(1, 3), shard(2), other]
        rng = random.Random(seed)
        while len(parts) > 1:  # any tree
            rng.shuffle(parts)
            both = joined([*_list(parts.pop()), *_list(parts.pop())])
            parts.append(both)  # type: ignore[arg-type]
        assert parts[0] == joined([RUN, other]) and len(parts[0]) == 2


def _list(part: Any) -> list[Any]:
    return part if isinstance(part, list) else [part]


def test_some_shards() -> None:
    (some,) = joined([shard(3), shard(1)])
    assert some == shard(1, 3) and shards_said(some) == "shards 1/4 and 3/4"
    assert shards_said(RUN) is None
    assert shards_said(shard(*range(9), of=9)) == "shards 0/9, 1/9, 2/9, 3/9, 4/9 and 4 more"


def test_shards_of_different_runs_stay_apart() -> None:
    for other in (shard(1, seq_len=17), shard(1, of=5), shard(1, torch="2.12")):
        assert len(joined([shard(0), other])) == 2


def test_what_would_count_twice() -> None:
    with pytest.raises(ReapError, match="shard 1/4 of one run would be added twice"):
        joined([shard(0, 1), shard(1, 2)])
    with pytest.raises(ReapError, match="shard 2/4 would be added to the run that has it"):
        joined([shard(2), RUN])


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([shard(0), shard(1), shard(3)], "shard 2/4 is missing: give all shards"),
        ([shard(0)], "shards 1/4, 2/4 and 3/4 are missing"),
        ([shard(0), shard(1), shard(1), shard(2)], "f1 and f2 both have shard 1/4: give it once"),
        ([shard(0, 1), shard(1, 2, 3)], "f0 and f1 both have shard 1/4"),
        ([shard(0, 1, 2), shard(3, seq_len=17)], "f0 and f1 are .*: seq_len is 16, and 17"),
        ([shard(0, 1, 2), shard(3, of=5)], "the number of shards is 4, and 5"),
        ([shard(0, 1, 2), shard(3, torch="2.12")], "torch is 2.13, and 2.12"),
        (
            [shard(0, 1, 2), shard(3, sources=[SOURCE | {"sha256": "34cd"}])],
            "sha256 of data 'a.txt' is 12ab, and 34cd",
        ),
        ([shard(0), shard(1, partial={"batches": 1})], "f1 is what shard 1/4 measured so far"),
    ],
)
def test_what_is_not_whole(entries: list[Any], reason: str) -> None:
    files = [(f"f{number}", [entry]) for number, entry in enumerate(entries)]
    with pytest.raises(ReapError, match=reason):
        check_whole(files)


def test_what_is_whole() -> None:
    check_whole([])
    check_whole([("a", [RUN]), ("b", [RUN])])
    check_whole([("a", [shard(0, 1, 2)]), ("b", [shard(3)]), ("c", [{"partial": 1}])])
    check_whole([("a", [shard(0)])], missing=True)
    both = [shard(0, 1, 2, 3), shard(0, of=1, seq_len=17)]
    check_whole([("a", both)])


@pytest.mark.parametrize(
    "damage",
    [
        7,
        {},
        {"numbers": [], "of": 2, "versions": {}},
        {"numbers": [2], "of": 2, "versions": {}},
        {"numbers": [0, 0], "of": 2, "versions": {}},
        {"numbers": ["0"], "of": 2, "versions": {}},
        {"numbers": [True], "of": 2, "versions": {}},
        {"numbers": [0], "of": 2, "versions": 5},
    ],
)
def test_damage(damage: Any) -> None:
    assert numbers_of({"shard": {"numbers": [0], "of": 2}}) == {0}  # of a run that is not done
    with pytest.raises(ReapError, match="in the data of statistics is none: they are damaged"):
        numbers_of({"shard": damage})


def test_differences_of_anything() -> None:
    """Entries are anybody's JSON objects."""
    assert list(differences({"sources": 5}, {"sources": [7, {}]})) == [
        ("the number of sources", 0, 2)
    ]
    assert list(differences({"a": 1}, {"b": None, "a": 1})) == []
