"""How two statistics differ, or two plans."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from madeup import madeup

from reap.errors import ReapError
from reap.model.structure import Structure
from reap.planning.differences import Difference, compare
from reap.planning.plan import make_plan
from reap.statistics.stats import Statistics


def test_equal_files_are_equal_bit_for_bit(tmp_path: Path) -> None:
    for name in ("a", "b"):
        madeup().save(tmp_path / name)
    found = compare(tmp_path / "a", str(tmp_path / "b"))
    assert found.bits and found.same and not found.differences
    assert all(one.overlap == 1 and not one.first_keeps for one in found.layers.values())
    other = madeup()
    other.data[0]["seq_len"] = 65
    other.save(tmp_path / "b", overwrite=True)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert not found.bits and found.same
    assert found.differences == [Difference("text: seq_len", 64, 65)]
    assert not compare(madeup(), madeup()).bits and compare(madeup(), madeup()).same


def test_statistics_of_other_text() -> None:
    one, other = madeup(), madeup(seed=1, domains=("code", "math"))
    other.data[0]["sources"][0]["sha256"] = "cd" * 32
    other.versions["torch"] = "3"
    found = compare(one, other, ratio=0.5)
    assert not found.same and found.kind == "statistics"
    said = {each.what: (each.first, each.second) for each in found.differences}
    assert said["tokens of domain prose"] == (300, None)
    assert said["tokens of domain math"] == (None, 300)
    assert said["text: sha256 of data 'code.jsonl'"] == ("ab" * 32, "cd" * 32)
    assert said["torch"] == ("2", "3")
    assert [e for e in found.differences if e.what == "data"] == [
        Difference("data", "prose.jsonl", None),
        Difference("data", None, "math.jsonl"),
    ]
    plans = [make_plan(stats, ratio=0.5) for stats in (one, other)]
    assert [len(set(plan.kept)) for plan in plans] == [4, 4]
    for name, layer in found.layers.items():
        a, b = (set(plan.kept[name]) for plan in plans)
        assert set(layer.first_keeps) == a - b and set(layer.second_keeps) == b - a
        assert layer.overlap == 1 - len(a - b) / 4
        assert layer.rank_correlation is not None and -1 <= layer.rank_correlation <= 1
    json.dumps(found.to_json())


def test_several_calibrations() -> None:
    one = madeup()
    two = one + madeup(seed=1, domains=("math",))
    found = compare(one, two)
    assert Difference("calibration text", None, "math.jsonl, 300 tokens") in found.differences


def test_plans() -> None:
    stats = madeup()
    one, other = make_plan(stats, ratio=0.5), make_plan(stats, "frequency", ratio=0.25)
    found = compare(one, other)
    said = {each.what: (each.first, each.second) for each in found.differences}
    assert said == {"criterion": ("reap", "frequency"), "ratio": ("0.5", "0.25")}
    for name, layer in found.layers.items():
        assert layer.rank_correlation is None
        assert set(layer.first_keeps) == set(one.kept[name]) - set(other.kept[name])
        assert set(layer.second_keeps) == set(other.kept[name]) - set(one.kept[name])
    again = compare(one, make_plan(madeup(seed=1), ratio=0.5))
    assert {each.what for each in again.differences} == {"calibration statistics"}
    assert compare(one, one).same and not again.same


def test_layers_that_cannot_be_compared() -> None:
    one = madeup()
    for other, why in (
        (madeup(layers=3), "4 layers against 3"),
        (madeup(experts=12), "has 8 experts against 12"),
        (Statistics(one.model), "saw no tokens"),
    ):
        found = compare(one, other)
        assert not found.layers and not found.same
        assert any("layers are not compared" in note and why in note for note in found.notes)
    plans = make_plan(one, ratio=0.5), make_plan(madeup(layers=3), ratio=0.5)
    assert "4 layers against 3" in compare(*plans).notes[-1] and not compare(*plans).same


def test_what_is_no_pair(tmp_path: Path) -> None:
    stats = madeup()
    stats.save(tmp_path / "stats")
    plan = make_plan(stats, ratio=0.5)
    plan.save(tmp_path / "plan")
    (tmp_path / "text").write_text("text")
    (tmp_path / "config").write_text('{"model_type": "qwen3_moe"}')
    for one, other, why in (
        (tmp_path / "stats", tmp_path / "plan", "give two of a kind"),
        (stats, tmp_path / "text", "text is no"),
        (stats, tmp_path / "config", "is a model's config: give two statistics, or two plans"),
        (stats, tmp_path / "none", "No such file"),
        (stats, 3, "second is a int: it must be statistics, a plan, or the file of one"),
        (stats, torch.ones(1), "second is a Tensor"),
    ):
        with pytest.raises(ReapError, match=why.replace("text is no", "text is not|text is no")):
            compare(one, other)  # type: ignore[arg-type]
    with pytest.raises(ReapError, match="ratio is 2"):
        compare(stats, stats, ratio=2)
    plan = make_plan(stats, ratio=0.5)
    with pytest.raises(ReapError, match="criterion and ratio are of two statistics"):
        compare(plan, plan, criterion="reap")
    with pytest.raises(ReapError, match="criterion is 'best'"):
        compare(stats, stats, criterion="best")


def test_what_a_file_of_an_earlier_version_holds() -> None:
    """Its model has no structure, and perhaps another name of the module: sums are compared."""
    one = madeup(layer_names=["a.layers.0.mlp", "a.layers.1.mlp"])
    other = madeup(layer_names=["b.a.layers.0.mlp", "b.a.layers.1.mlp"])
    other.model = replace(other.model, structure=Structure(config={"hidden_size": 8}))
    found = compare(one, other)
    assert one != other and one.same_sums(other) and found.same and not found.differences
    changed = madeup(layer_names=["a.layers.0.mlp", "a.layers.1.mlp"], seed=1)
    assert not compare(changed, other).same and not changed.same_sums(other)
    with_pairs = madeup(layer_names=one.layers, pairs=True)
    assert not one.same_sums(with_pairs) and not one.same_sums(madeup(3))


def test_a_ratio_of_no_expert_compares_none() -> None:
    found = compare(madeup(), madeup(seed=1), ratio=1e-9)
    assert not found.layers and not found.same
    assert found.notes == [
        "layers are not compared: ratio 1e-09 drops no expert: give a larger one"
    ]
