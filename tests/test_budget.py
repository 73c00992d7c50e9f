"""One budget for all layers: exact, floored, in multiples, and the best there is."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reap.errors import ReapError
from reap.model.info import LayerInfo
from reap.planning.budget import check_scope, global_counts, normalized, staying
from reap.planning.counting import count_fault


def layer(name: str, experts: int = 8, **info: Any) -> LayerInfo:
    return LayerInfo(name, experts, **{"top_k": 2, **info})


def test_rules_make_layers_comparable() -> None:
    scores = {"small": torch.tensor([1.0, 3.0]), "large": torch.tensor([10.0, 20.0, 30.0, 60.0])}
    assert normalized(scores, "raw") == scores
    means = normalized(scores, "mean")
    assert means["small"].tolist() == [0.5, 1.5] and means["large"].mean() == 1
    shares = normalized(scores, "share")
    assert shares["small"].tolist() == [0.25, 0.75] and shares["large"].sum() == 1
    # An average expert is worth the same by mean, more in the smaller layer by share.
    assert means["small"].mean() == means["large"].mean()
    assert shares["small"].mean() == 2 * shares["large"].mean()


def test_each_rule_keeps_other_experts() -> None:
    """Two layers of equal shape at different scales, and a smaller one."""
    layers = [layer("a", 6, top_k=1), layer("b", 6, top_k=1), layer("c", 2, top_k=1)]
    scores = {
        "a": torch.tensor([9.0, 1, 1, 1, 1, 1]),
        "b": torch.tensor([70.0, 60, 50, 40, 30, 20]),
        "c": torch.tensor([2.1, 1]),
    }

    def counts(rule: str) -> list[int]:
        ranked = {k: sorted(v.tolist(), reverse=True) for k, v in normalized(scores, rule).items()}
        return global_counts(layers, ranked, total=7)

    assert counts("raw") == [1, 5, 1]  # what is large
    assert counts("mean") == [1, 5, 1]  # 1.56, 1.33, 1.11, 0.89, 0.67 of b before 0.65 of c
    assert counts("share") == [1, 4, 2]  # a third of c before a ninth of b
    scores["b"] /= 1000
    assert counts("raw") == [5, 1, 1]
    assert counts("mean") == [1, 5, 1]


def test_nothing_to_divide_by() -> None:
    with pytest.raises(ReapError, match="layer a: its scores add up to 0.*normalize by raw"):
        normalized({"a": torch.zeros(3)}, "mean")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("both", "mean"), "scope is 'both': it must be one of layer, global"),
        (("global", "rank"), "normalize is 'rank': it must be one of raw, mean, share"),
    ],
)
def test_words_that_there_are_not(arguments: tuple[str, str], message: str) -> None:
    with pytest.raises(ReapError, match=message):
        check_scope(*arguments)


def test_what_one_scope_has() -> None:
    check_scope("layer", None, total=None)
    with pytest.raises(ReapError, match="normalize is of one budget"):
        check_scope("layer", "mean")
    check_scope("global", "mean", total=3)
    with pytest.raises(
        ReapError, match='total is of one budget for all layers: pass scope="global" too'
    ):
        check_scope("layer", "mean", total=3)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_split_is_better(data: st.DataObject) -> None:
    """Against all splits of the budget, with floors and multiples."""
    experts = data.draw(st.sampled_from([4, 6]))
    step = data.draw(st.sampled_from([1, 2]))
    least = data.draw(st.integers(1, 3))
    layers = [layer(name, experts, top_k=1) for name in "abc"]
    ranked = {
        one.name: sorted(
            data.draw(st.lists(st.integers(0, 9), min_size=experts, max_size=experts)),
            reverse=True,
        )
        for one in layers
    }
    floor = -(-least // step) * step
    total = data.draw(st.integers(floor * 3 // step, experts * 3 // step)) * step
    counts = global_counts(layers, ranked, total=total, multiple_of=step, least=least)
    assert sum(counts) == total
    assert all(n >= least and n % step == 0 and n <= experts for n in counts)

    def worth(split: tuple[int, ...] | list[int]) -> int:
        return sum(sum(ranked[one.name][:n]) for one, n in zip(layers, split, strict=True))

    choices = itertools.product(range(floor, experts + 1, step), repeat=3)
    assert worth(counts) == max(worth(split) for split in choices if sum(split) == total)


def test_routers_keep_what_they_need() -> None:
    layers = [layer("a", top_k=3), layer("b", n_group=2, topk_group=1, min_per_group=2)]
    ranked = {"a": [0.0] * 8, "b": [9.0] * 8}
    counts = global_counts(layers, ranked, total=11)
    assert counts == [3, 8]
    counts = global_counts(layers, {"a": [9.0] * 8, "b": [0.0] * 8}, total=12)
    assert counts == [8, 4] and not any(map(count_fault, layers, counts))


def test_budgets_as_ratio_and_average() -> None:
    layers = [layer("a"), layer("b")]
    ranked = {"a": [8.0, 7, 6, 5, 4, 3, 2, 1], "b": [1.0, 0, 0, 0, 0, 0, 0, 0]}
    assert global_counts(layers, ranked, keep=5) == [8, 2]
    assert global_counts(layers, ranked, ratio=0.5) == [6, 2]
    assert global_counts(layers, ranked, ratio="0.3", multiple_of=4) == [8, 4]  # 12 of 16
    assert global_counts(layers, ranked, ratio=0.5, least=4) == [4, 4]
    assert global_counts(layers, ranked, keep=4, protected={"b": (5, 6, 7)}) == [5, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of ratio, keep and total"),
        ({"keep": 4, "total": 8}, "exactly one of"),
        ({"total": 0}, "total is 0: it must be a whole number of 1 or more"),
        ({"total": 3}, "cannot keep 3 of 16 experts: .*at least 4: .* total 4 or ratio 0.8"),
        ({"total": 17}, "at most 16: the nearest that works is total 16"),
        ({"ratio": 0.9}, "cannot keep 2 of 16 experts: .* total 4 or ratio 0.8"),
        ({"total": 9, "multiple_of": 4}, "exactly 9 .*multiple of 4: .* total 12"),
        ({"total": 12, "least": 7}, "at least 14"),
        ({"total": 12, "least": 9}, "layer a: no multiple of 1 from 9 to its 8 experts"),
        ({"total": 12, "multiple_of": 16}, "layer a: no multiple of 16"),
    ],
)
def test_budgets_that_cannot_be_met(options: dict[str, Any], message: str) -> None:
    layers = [layer("a"), layer("b")]
    with pytest.raises(ReapError, match=message):
        global_counts(layers, {"a": [1.0] * 8, "b": [1.0] * 8}, **options)


def test_layers_of_other_multiples() -> None:
    layers = [
        layer("a", 9, n_group=3, topk_group=3, top_k=1),
        layer("b", 8, n_group=2, topk_group=2),
    ]
    ranked = {"a": [5.0] * 9, "b": [1.0] * 8}
    assert global_counts(layers, ranked, total=11) == [9, 2]
    with pytest.raises(ReapError, match="multiples of 2, 3: the nearest that works is total"):
        global_counts(layers, ranked, total=6)


def test_the_order_in_which_experts_stay() -> None:
    one = layer("a", 6, n_group=2, topk_group=2)
    assert staying(one, [5, 0, 4, 3, 2, 1], ()) == [0, 5, 2, 4, 1, 3]
    assert staying(one, [5, 0, 4, 3, 2, 1], (1, 3)) == [1, 3, 0, 5, 2, 4]
