"""What a card says of the text and the experts, whatever a record holds."""

from __future__ import annotations

from typing import Any

from reap.checkpoint.composition import calibration_lines, cell, ids, sources_of


def test_sources_and_their_shares() -> None:
    one = {"spec": "a.jsonl=3", "domain": "code", "tokens": 400, "counted": 300}
    two = {"spec": "b|c\n`d`", "domain": "chat", "tokens": 100}
    lines = calibration_lines({"data": [{"sources": [one]}, {"sources": [two, "odd", {}]}, 7]})
    assert lines[2:] == [
        "| `a.jsonl=3` | `code` | 300 | 75.0% |",
        "| `b\\|c 'd'` | `chat` | 100 | 25.0% |",
    ]
    assert sources_of({"sources": [one, two]}) == "`a.jsonl=3`, `b\\|c 'd'`"


def test_what_is_not_said() -> None:
    nothing: list[dict[str, Any]] = [{}, {"data": None}, {"data": [{"sources": 3}]}, {"data": [{}]}]
    for calibration in nothing:
        assert calibration_lines(calibration) == []
    assert sources_of({}) == "text that is not named"


def test_ids() -> None:
    assert ids([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8" and ids([4]) == "4" and ids([]) == ""


def test_a_cell_stays_one() -> None:
    assert cell("a`b`\n| c") == "`a'b' \\| c`"
