"""A Merge survives its file, and refuses what makes no sense."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from merges import a_model, counted, some_merge

from reap.errors import ReapError
from reap.merging.mergeplan import Merge
from reap.planning.plan import make_plan

COUNTS = {"a": [8, 1, 9, 1, 1, 0], "b": [1, 2, 3, 4, 5, 6]}


def test_through_its_file(tmp_path: Path) -> None:
    merge = some_merge(a_model())
    merge.save(tmp_path / "merge.json")
    assert Merge.load(tmp_path / "merge.json") == merge == Merge.from_json(merge.to_json())
    assert Merge.of(tmp_path / "merge.json") == merge and Merge.of(merge) is merge
    assert copy.deepcopy(merge) == pickle.loads(pickle.dumps(merge)) == merge
    with pytest.raises(ReapError, match="exists: choose another name"):
        merge.save(tmp_path / "merge.json")
    merge.save(tmp_path / "merge.json", overwrite=True)
    assert "6 to 3 experts in 2 layers" in repr(merge)


def test_other_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    stats = counted(a_model(), COUNTS)
    make_plan(stats, keep=3).save(tmp_path / "plan.json")
    stats.save(tmp_path / "stats")
    for name, kind in (("plan.json", "a plan"), ("stats", "statistics")):
        with pytest.raises(ReapError, match=f"is {kind}, not a merge"):
            Merge.load(tmp_path / name)
    with pytest.raises(ReapError, match="will not overwrite"):
        some_merge(stats.model).save(tmp_path / "plan.json", overwrite=True)


def groups_of(data: dict[str, Any]) -> list[dict[str, Any]]:
    return data["layers"]["a"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="reap-plan"), "is no merge"),
        (lambda d: d.update(version=2), "has version 2: this program reads version 1"),
        (lambda d: d.pop("method"), "field 'method' must be a JSON str"),
        (lambda d: d["layers"].pop("a"), "'a' is in the model but not the merge"),
        (lambda d: d["layers"].update(c=[]), "'c' is in the merge but not the model"),
        (lambda d: d["layers"].update(a={}), "must be a list of objects of the lists"),
        (lambda d: groups_of(d)[0].update(more=1), "must be a list of objects of the lists"),
        (lambda d: groups_of(d)[0].update(experts=3), "must be a list of objects of the lists"),
        (lambda d: groups_of(d).pop(), "must hold each of its 6 experts once"),
        (lambda d: groups_of(d).reverse(), "groups must ascend by their first expert"),
        (lambda d: groups_of(d)[0]["experts"].reverse(), "groups must ascend"),
        (lambda d: groups_of(d)[0].update(experts=[], weights=[]), "groups must ascend"),
        (lambda d: groups_of(d)[0].update(experts=[0, 6]), "must be an id from 0 to 5"),
        (lambda d: groups_of(d)[0].update(experts=[0, True]), "must be an id from 0 to 5"),
        (lambda d: groups_of(d)[0].update(weights=[1]), "2 numbers from 0 to 2"),
        (lambda d: groups_of(d)[0].update(weights=[0, 0]), "one of them more than 0"),
        (lambda d: groups_of(d)[0].update(weights=[1, -1]), "2 numbers from 0 to 2"),
        (lambda d: groups_of(d)[0].update(weights=[1, "1"]), "2 numbers from 0 to 2"),
        (lambda d: groups_of(d)[0].update(weights=[1, 10**400]), "2 numbers from 0 to 2"),
        (lambda d: groups_of(d)[0].update(weights=[1, 1e308]), "2 numbers from 0 to 2"),
    ],
)
def test_damaged_files(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    data = json.loads(some_merge(a_model()).to_json())
    change(data)
    with pytest.raises(ReapError, match=message):
        Merge.from_json(json.dumps(data))
