"""Lines on stderr for runs that nobody watches."""

from __future__ import annotations

from typing import Any

import pytest

from reap.app import longruns


def test_a_line_a_minute(monkeypatch: Any, capsys: Any) -> None:
    now = 100.0
    monkeypatch.setattr("reap.app.longruns.time.monotonic", lambda: now)
    with longruns.reported("calibrating", lambda: 9000, "tokens") as advance:
        for _ in range(5):
            now += 30
            advance(1500)
    with longruns.reported("calibrating", lambda: None, "tokens") as advance:
        now += 60
        advance(60)
    with longruns.reported("calibrating", lambda: 9000, "tokens", quiet=True) as advance:
        now += 60
        advance(60)
    assert capsys.readouterr().err.splitlines() == [
        "reap: calibrating: 3,000 of about 9,000 tokens, 50 tokens/s, 2 min left",
        "reap: calibrating: 6,000 of about 9,000 tokens, 50 tokens/s, 1 min left",
        "reap: calibrating: 60 tokens, 1 tokens/s",
    ]


@pytest.mark.parametrize(
    ("tokens", "quiet", "said"),
    [
        (99_999, False, ""),
        (100_000, False, "reap: m on cpu, about 100,000 tokens\n"),
        (None, False, "reap: m on cpu, of unknown length\n"),
        (None, True, ""),
    ],
)
def test_the_first_line(tokens: int | None, quiet: bool, said: str, capsys: Any) -> None:
    longruns.announce("m on cpu", tokens, quiet)
    assert capsys.readouterr().err == said
