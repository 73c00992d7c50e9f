"""What plans cost, as `reap evaluate --json` printed it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from reap.errors import ReapError
from reap.report.measured import costs_of, read_costs, tables
from reap.runs.evaluation import Evaluation

ONE = {
    name: Evaluation(100, loss, math.exp(loss), 0.1, 0.9, 2.0).to_json()
    for name, loss in (("code", 2.5), ("total", 2.25))
}
PLAIN = {"total": Evaluation(100, 3.0, math.exp(3)).to_json()}


def test_of_one_model(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text(json.dumps(ONE))
    code, total = read_costs(tmp_path / "half.json")
    assert (code.plan, code.domain, code.tokens, code.increase) == ("half", "code", 100, 0.5)
    assert total.kl == 0.1 and total.teacher_loss == 2.0


def test_of_several_plans() -> None:
    costs = costs_of({"a": ONE, "b": PLAIN | {"total": ONE["total"] | {"more": "of it"}}})
    assert [(c.plan, c.domain) for c in costs] == [("a", "code"), ("a", "total"), ("b", "total")]
    plans, domains, found = tables(costs)
    assert (plans, domains) == (["a", "b"], ["code", "total"])
    increase, kl = found.values()
    assert increase[0].tolist() == [0.5, 0.25] and math.isnan(float(increase[1, 0]))
    assert kl[1, 1] == 0.1


def test_without_a_teacher() -> None:
    costs = costs_of(PLAIN, name="x")
    assert math.isnan(costs[0].increase)
    _, _, found = tables(costs)
    assert list(found) == ["loss, nats per token"]
    assert tables([]) == ([], [], {})
    # A loss that was no number is null in the document.
    nothing = costs_of({"total": {"tokens": 3, "loss": None}}, name="x")
    assert tables(nothing)[2] == {}


BAD: dict[str, tuple[Any, str]] = {
    "nothing": ({}, "evaluates nothing"),
    "failed": ({"error": "no\nsuch model"}, "is of an evaluation that failed: no such model"),
    "no domains": ({"a": {}}, "'a' has no domains"),
    "a number": ({"a": 3}, "'a' has no domains"),
    "a plan": ({"format": "reap-plan", "layers": {}}, "is a plan, not an evaluation"),
    "no loss": ({"a": {"code": {"tokens": 3}}}, "'code' of 'a' lacks tokens and loss"),
    "mixed": ({"a": ONE, "b": {"tokens": 1, "loss": 2.0}}, "'tokens' of 'b' lacks"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_evaluation(tmp_path: Path, kind: str) -> None:
    document, why = BAD[kind]
    (tmp_path / "e.json").write_text(json.dumps(document))
    with pytest.raises(ReapError, match="e.json .*" + why):
        read_costs(tmp_path / "e.json")


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    with pytest.raises(ReapError):
        read_costs(tmp_path / "text")
    with pytest.raises(ReapError, match="cannot read"):
        read_costs(tmp_path / "none")
    with pytest.raises(ReapError, match="evaluation is a int"):
        read_costs(3)  # type: ignore[arg-type]


def test_numbers_that_nothing_has() -> None:
    """Integers of JSON have no end; a float's do."""
    huge = 10**400
    (cost,) = costs_of({"a": {"b": {"tokens": 5, "loss": huge, "kl": -huge}}})
    assert math.isnan(cost.loss) and math.isnan(cost.kl)
    for tokens in (huge, -1, True):
        with pytest.raises(ReapError, match="lacks tokens and loss"):
            costs_of({"a": {"b": {"tokens": tokens, "loss": 1.0}}})


def test_names_that_look_alike_stay_apart() -> None:
    """A file's name may be longer than what is shown, and differ in the middle, or in a tab."""
    names = ["x" * 200 + middle + "y" * 200 for middle in "AB"]
    found = {name: {"a b": ONE["code"], "a\tb": ONE["code"]} for name in names}
    costs = costs_of(found)
    plans, domains, shown = tables(costs)
    assert len(costs) == 4 and len(plans) == 2 and domains == ["a b", "a b (2)"]
    assert all(table.shape == (2, 2) and not table.isnan().any() for table in shown.values())
