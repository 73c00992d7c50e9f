"""Names and numbers as a page shows them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap.report.wording import distinct, letter, number, plain, ranges, share, signed


@given(st.text())
def test_plain_is_one_line_that_can_be_written(text: str) -> None:
    shown = plain(text, 20)
    assert len(shown) <= 20 and len(shown.splitlines()) <= 1
    shown.encode()
    assert all(letter.isprintable() for letter in shown)


def test_plain() -> None:
    assert plain("a\n b\tc") == "a b c"
    assert plain("\u202eabc\ud800\x00") == "\ufffdabc\ufffd\ufffd"
    assert plain("x" * 100 + "y" * 100, 9) == "xxxx\u2026yyyy"
    assert plain(["a"]) == "['a']" and plain("$x$") == "$x$"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "\u2013"),
        (math.nan, "\u2013"),
        (math.inf, "\u221e"),
        (-math.inf, "\u2212\u221e"),
        (0.0, "0"),
        (12345.0, "12,345"),
        (1234.56, "1,235"),
        (123.456, "123"),
        (0.0123456, "0.0123"),
        (-0.5, "\u22120.5"),
        (1e-9, "1e\u221209"),
    ],
)
def test_numbers(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_others() -> None:
    assert signed(0.25) == "+0.25" and signed(-2.0) == "\u22122" and signed(None) == "\u2013"
    assert share(0.256) == "26%" and share(None) == "\u2013"
    assert ranges([0, 1, 2, 5, 7, 8]) == "0 to 2, 5, 7, 8" and ranges([]) == "none"
    assert ranges([0, 2, 4, 5, 6], most=2) == "0, 2, 3 more"
    assert [letter(n) for n in (0, 25, 26, 701, 702)] == ["A", "Z", "AA", "ZZ", "AAA"]


@given(st.lists(st.text(max_size=4)))
def test_distinct_names_stay_apart(names: list[str]) -> None:
    shown = distinct(names, 3)
    assert len(shown) == len(set(shown)) == len(names)


def test_distinct() -> None:
    assert distinct(["a", "b"]) == ["a", "b"]
    assert distinct(["a b", "a\nb", "a b (2)", "a\tb"]) == [
        "a b",
        "a b (2)",
        "a b (2) (2)",
        "a b (3)",
    ]
