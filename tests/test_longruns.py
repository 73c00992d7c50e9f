"""Lines on stderr for runs that nobody watches."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from reap.app import longruns
from reap.text.sources import Source


def test_a_line_when_it_can_be_told_and_then_a_minute_each(monkeypatch: Any, capsys: Any) -> None:
    now = 100.0
    monkeypatch.setattr("reap.app.longruns.time.monotonic", lambda: now)
    with longruns.reported("calibrating", lambda: 9000, "tokens") as advance:
        for _ in range(5):
            now += 30
            advance(1500)
    with longruns.reported("calibrating", lambda: None, "tokens") as advance:
        now += 60
        advance(60)
    with longruns.reported("calibrating", lambda: 90_000, "tokens") as advance:
        for _ in range(9):  # no line of what is over soon
            now += 1
            advance(60)
        now += 1
        advance(60)
    assert capsys.readouterr().err.splitlines() == [
        "reap: calibrating: 1,500 of about 9,000 tokens, 50 tokens/s, 2.5 min left",
        "reap: calibrating: 4,500 of about 9,000 tokens, 50 tokens/s, 1.5 min left",
        "reap: calibrating: 7,500 of about 9,000 tokens, 50 tokens/s, 30 s left",
        "reap: calibrating: 60 tokens, 1 tokens/s",
        "reap: calibrating: 600 of about 90,000 tokens, 60 tokens/s, 24.8 min left",
    ]


class Text:
    """Batches of 2**20 tokens, which take `seconds`; `expected` of them are known."""

    def __init__(self, seconds: float, expected: int | None) -> None:
        self.seconds, self.expected, self.read, self.now = seconds, expected, 1 << 16, 0.0

    def read_ahead(self, advance: Any, limit: int = 1 << 26) -> bool:
        total = 1 << 20
        end = min(total, limit)
        self.now += self.seconds * (end - self.read) / total
        advance(end - self.read)
        self.read = end
        return end == total


@pytest.mark.parametrize(
    ("seconds", "expected", "said"),
    [
        (7200, 1 << 20, "reap: reading: about 1,048,576 tokens, about 2.0 h"),
        (9, 1 << 20, None),
        (40, None, "reap: reading: about 67,108,864 tokens, about 42.7 min"),
    ],
)
def test_an_estimate_before_long_reads(
    seconds: float, expected: int | None, said: str | None, monkeypatch: Any, capsys: Any
) -> None:
    text: Any = Text(seconds, expected)
    monkeypatch.setattr("reap.app.longruns.time.monotonic", lambda: text.now)
    longruns.read_on(text, [Source("a.txt", "files", "a.txt", "a")])
    lines = capsys.readouterr().err.splitlines()
    assert (said is None and not lines) or said in lines[:2]
    assert text.read == 1 << 20


def test_nobody_at_the_other_end_stops_nothing(monkeypatch: Any) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stderr", full)
        longruns.announce("calibrating", "m on cpu")
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
