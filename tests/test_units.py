"""Sizes and numbers as people read them."""

from __future__ import annotations

from reap.files.units import counted, runs_of, sized, spanned


def test_one_is_no_plural() -> None:
    assert counted(1, "expert") == "1 expert" and counted(2000, "expert") == "2,000 experts"
    assert counted(0, "MoE layer") == "0 MoE layers"


def test_the_least_and_the_most() -> None:
    assert spanned([1, 1], "expert") == "1 expert" and spanned([3], "expert") == "3 experts"
    assert spanned(iter([4, 1, 3000]), "expert") == "1 to 3,000 experts"


def test_sizes() -> None:
    assert [sized(n) for n in (999, 1000, 2_500_000, 10**12)] == [
        *("999 bytes", "1.00 kB", "2.50 MB", "1000.00 GB")
    ]


def test_runs() -> None:
    assert runs_of([0, 1, 2, 5, 7, 8]) == [(0, 2), (5, 5), (7, 8)] and runs_of([]) == []
