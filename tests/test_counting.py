"""How many experts stay, before there are statistics."""

from __future__ import annotations

from typing import Any

import pytest

from reap.errors import ReapError
from reap.model.info import LayerInfo
from reap.planning.counting import count_fault, kept_counts, split_note


def layer(experts: int, **info: Any) -> LayerInfo:
    return LayerInfo("a", experts, **{"top_k": 2, **info})


def test_every_layer_has_its_own_number() -> None:
    layers = [layer(8), layer(16), layer(12, n_group=3)]
    assert kept_counts(layers, ratio=0.25) == [6, 12, 9]
    assert kept_counts(layers, keep=6) == [6, 6, 6]
    assert kept_counts(layers, ratio="0.4", multiple_of=2) == [6, 10, 12]


@pytest.mark.parametrize(
    ("info", "options", "advice"),
    [
        ({}, {"keep": 9}, "keep 7 or ratio 0.2"),
        ({}, {"keep": 9, "multiple_of": 4}, "keep 4 or ratio 0.5"),
        ({"top_k": 5}, {"keep": 3, "multiple_of": 8}, None),
        ({"n_group": 4, "topk_group": 1}, {"keep": 5}, None),
        ({}, {"ratio": 0.1, "multiple_of": 16}, "no multiple of 16 works for 8 experts"),
    ],
)
def test_no_advice_drops_nothing(info: Any, options: Any, advice: str | None) -> None:
    """What the advice says is followed: it drops an expert."""
    try:
        assert kept_counts([layer(8, **info)], **options) == [8] and advice is None
    except ReapError as error:
        if advice is None:
            assert "works for 8 experts but all of them" in str(error)
            return
        assert str(error).endswith(advice)
        if "keep" in advice:
            fewer = int(advice.split("keep ")[1].split()[0])
            multiple = options.get("multiple_of", 1)
            (kept,) = kept_counts([layer(8)], keep=fewer, multiple_of=multiple)
            (share,) = kept_counts([layer(8)], ratio=advice.split()[-1], multiple_of=multiple)
            assert kept == share == fewer < 8


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_what_a_note_advises_works(groups: int) -> None:
    """For every count that a note speaks of: the multiple gives what it says, by either option."""
    experts, seen = 48, 0
    info = layer(experts, n_group=groups)
    for kept in range(groups, experts, groups):
        note = split_note(info, kept) or ""
        if "multiple_of=" in note:
            multiple = int(note.split("multiple_of=")[1].split(",")[0])
            better = int(note.rsplit(" ", 1)[1])
            assert better < experts
            assert kept_counts([info], keep=kept, multiple_of=multiple) == [better]
            ratio = f"{experts - kept}/{experts}"
            assert kept_counts([info], ratio=ratio, multiple_of=multiple) == [better]
            seen += 1
        elif "keep=" in note:
            fewer = int(note.split("keep=")[1])
            assert 0 < fewer < experts and count_fault(info, fewer) is None
            seen += 1
    assert seen


@pytest.mark.parametrize("ratio", [5e-324, 1e-300, "1e-9", 1e-5, "0.0"])
def test_a_ratio_of_no_expert_is_a_number(ratio: Any) -> None:
    assert kept_counts([layer(8)], ratio=ratio) == [8]


@pytest.mark.parametrize("ratio", [0.9999999, "0.99999999999999999"])
def test_a_ratio_of_all_but_one_names_the_nearest(ratio: Any) -> None:
    with pytest.raises(ReapError, match="cannot keep 1 of 8 .* works is keep 2 or ratio 0.8"):
        kept_counts([layer(8)], ratio=ratio)
