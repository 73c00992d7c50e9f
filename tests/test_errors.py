"""What we say of another library's error."""

import pytest

from reap.errors import first_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("one", "one"),
        ("one\ntwo", "one"),
        ("", "ValueError"),
        (" \n ", "ValueError"),
        ("is built from one of:\n(1) a file\n(2) a hub", "is built from one of: (1) a file"),
        ("announces:\n\n  more:\n  a   reason\nrest", "announces: more: a reason"),
        ("announces nothing:", "announces nothing"),
    ],
)  # fmt: skip
def test_an_announcement_keeps_what_it_announces(text, line):
    assert first_line(ValueError(text)) == line
