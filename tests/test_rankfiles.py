"""The files of a run's processes: whose they are, and whether all see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from slots import MODEL, NAME, slots

from reap.errors import ReapError
from reap.files.lock import Lock
from reap.runs import rankfiles
from reap.runs.rankfiles import check_shared, rank_file, refuse_others, sum_of_ranks
from reap.statistics.stats import Statistics


def test_names(tmp_path: Path) -> None:
    out = tmp_path / "x.st"
    assert rank_file(out).name == "x.st.partial.safetensors"
    assert rank_file(out, 3, 16).name == "x.st.rank-3-of-16.partial.safetensors"


@pytest.mark.parametrize(
    ("left", "size", "message"),
    [
        ((0, 1), 2, "earlier run of one process measured, and this one is of 2 processes"),
        ((1, 4), 1, "earlier run of 4 processes measured, and this one is of one process"),
        ((1, 4), 2, "earlier run of 4 processes measured, and this one is of 2 processes"),
    ],
)
def test_another_number_of_ranks(
    tmp_path: Path, left: tuple[int, int], size: int, message: str
) -> None:
    out = tmp_path / "x[1].st"  # no pattern
    rank_file(out, *left).touch()
    rank_file(tmp_path / "x1.st", 0, 7).touch()
    refuse_others(out, left[1])
    with pytest.raises(ReapError, match=message):
        refuse_others(out, size)


def test_a_folder_that_is_not_shared(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(rankfiles, "_SEEN_SECONDS", 0.2)
    out = tmp_path / "x.st"
    held = [Lock(rank_file(out, rank, 2)) for rank in range(2)]
    check_shared(out, 2)
    held[1].release()
    with pytest.raises(ReapError, match="rank 1 of 2 writes to another folder"):
        check_shared(out, 2)


def test_the_sum_is_of_one_run(tmp_path: Path) -> None:
    out, whole = tmp_path / "x.st", Statistics(MODEL)
    entry = {"seq_len": 16, "sources": []}
    for rank in range(3):
        part, data = Statistics(MODEL), slots(5, seed=rank)
        for stats in (part, whole):
            stats.update(NAME, *data)
        shard = {"shard": {"numbers": [rank], "of": 3}}
        part.data = [entry | shard | {"partial": {"batches": 9}}]
        part.save(rank_file(out, rank, 3))
    total = sum_of_ranks(out, 3)
    assert total == whole and total.data == [entry]
    part.data = [part.data[0] | {"seq_len": 17}]
    part.save(rank_file(out, 2, 3), overwrite=True)
    with pytest.raises(ReapError, match="shards of different runs: seq_len is 16, and 17"):
        sum_of_ranks(out, 3)
