"""What statistics say of their text, and what anybody may write there."""

from __future__ import annotations

from madeup import HOSTILE, text

from reap.report.texts import runs


def test_as_a_calibration_writes_it() -> None:
    entry = text(("code", "prose"), 50) | {
        "batch_size": 2,
        "packing": False,
        "count": {"after": "</think>"},
        "counted": 40,
        "ended": "stable after 40 tokens",
        "run": {"dtype": "bfloat16", "device": "cpu"},
        "shard": {"numbers": [0], "of": 2, "versions": {}},
        "partial": {"batches": 3},
    }
    (run,) = runs([entry])
    facts = {
        "unfinished": "this is what a calibration measured so far",
        "only": "shard 0/2",
        "tokens": "100",
        "counted": "40",
        "which tokens count": "those after '</think>'",
        "seq len": "64",
        "batch size": "2",
        "rows": "a sample each",
        "ended": "stable after 40 tokens",
        "device": "cpu",
        "dtype": "bfloat16",
    }
    assert run.facts == facts
    first, second = run.sources
    assert (first.spec, first.domain, first.tokens, first.weight) == ("code.jsonl", "code", 50, 1.0)
    assert second.counts["rows"] == 3 and second.counts["uncounted"] is None


def test_anything_else_is_left_out() -> None:
    odd: list[dict] = [
        {},
        {"sources": 3, "tokens": "many", "run": [], "seq_len": None},
        {"sources": [1, {}, {"spec": {"a": HOSTILE}, "weight": "w", "tokens": 1.5}]},
    ]
    nothing, numbers, sources = runs(odd)
    assert nothing.facts == numbers.facts == {} and nothing.sources == numbers.sources == []
    unnamed, named = sources.sources
    assert unnamed.spec == "unnamed" and unnamed.tokens is named.tokens is None
    assert len(named.spec) <= 120 and "\n" not in named.spec and named.weight is None
    assert runs([]) == []


def test_numbers_that_nothing_has() -> None:
    huge = 10**400
    source = {"spec": "s", "tokens": huge, "counted": -1, "weight": huge, "rows": True}
    (run,) = runs([{"tokens": huge, "seq_len": huge, "counted": huge, "sources": [source]}])
    (read,) = run.sources
    assert not run.facts and read.tokens is read.counted is read.weight is read.counts["rows"]
    assert read.tokens is None
