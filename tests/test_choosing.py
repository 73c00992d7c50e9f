"""A merge is what its method says of the statistics, and is refused where they cannot say it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from merges import a_model, counted
from tiny import tiny_inputs, tiny_model

from reap.errors import ReapError
from reap.merging.choosing import make_merge
from reap.merging.grouping import hierarchical
from reap.merging.mergeplan import Group
from reap.model.experts import find_experts
from reap.observation.patch import observe

COUNTS = {"a": [8, 1, 9, 1, 1, 0], "b": [1, 2, 3, 4, 5, 6]}
POINTS = torch.tensor([0.0, 0.1, 9.0, 9.2, 5.0, 0.0], dtype=torch.float64)[:, None]


def test_hc_smoe_clusters_mean_outputs_and_weighs_by_tokens() -> None:
    stats = counted(a_model(), COUNTS, POINTS)
    merge = make_merge(stats, ratio=0.5)
    assert merge.groups["a"] == (
        Group((0, 1), (8, 1)), Group((2, 3, 5), (9, 1, 0)), Group((4,), (1,))
    )  # fmt: skip
    assert merge.groups["b"] == (
        Group((0, 1, 5), (1, 2, 6)), Group((2, 3), (3, 4)), Group((4,), (5,))
    )  # fmt: skip
    assert merge.left == {"a": 3, "b": 3} and merge.method == "hc-smoe"
    assert merge.groups["a"][0].shares == (8 / 9, 1 / 9)
    assert merge.calibration["tokens"] == 21 and merge.options["ratio"] == "0.5"
    assert make_merge(stats, groups=3).groups == merge.groups


def test_mean_outputs_of_a_model_from_its_statistics(tmp_path: Path) -> None:
    """From the file, against means over the routed tokens that each expert computes alone."""
    model: Any = tiny_model("qwen3_moe")
    inputs = tiny_inputs(model, batch=12)
    calls: dict[str, tuple[Any, ...]] = {}
    experts = {one.name: one.module for one in find_experts(model)}
    for name, module in experts.items():
        module.register_forward_hook(lambda _, args, out, name=name: calls.update({name: args}))
    with torch.no_grad():
        with observe(model, outputs=True) as stats:
            model(**inputs)
        stats.save(tmp_path / "stats")
        merge = make_merge(tmp_path / "stats", ratio=0.5)
        for name, (hidden, ids, _) in calls.items():
            counts = ids.flatten().bincount(minlength=8).numpy()
            means = torch.zeros(8, 32, dtype=torch.float64)
            for e in range(8):
                rows = hidden[(ids == e).any(1)]
                one = torch.full((len(rows), 1), e), torch.ones(len(rows), 1)
                if len(rows):
                    means[e] = experts[name](rows, *one).double().mean(0)
            members = hierarchical(means.numpy(), counts, 4)
            assert [list(group.experts) for group in merge.groups[name]] == members
            assert merge.groups[name][0].weights == tuple(counts[members[0]])


def test_m_smoe_gathers_around_the_most_frequent() -> None:
    similarity = {name: torch.eye(6) for name in COUNTS}
    similarity["a"][1, 2] = similarity["a"][5, 2] = 0.5
    stats = counted(a_model(), COUNTS)
    merge = make_merge(stats, "m-smoe", groups=2, similarity=similarity)
    assert merge.groups["a"] == (Group((0, 3, 4), (8, 1, 1)), Group((1, 2, 5), (1, 9, 0)))
    spread = make_merge(stats, "m-smoe", ratio=0.5, scope="global", similarity=similarity)
    # Shares in a: .45 .40 and .05; in b: .29 .24 .19 .14 and less.
    assert spread.left == {"a": 2, "b": 4} and spread.options["scope"] == "global"


def test_a_group_without_a_token_keeps_the_dominant_expert() -> None:
    stats = counted(a_model(6, "a"), {"a": [9, 0, 0, 0, 0, 0]})
    similarity = torch.eye(6)
    similarity[2:, 1] = 0.5
    merge = make_merge(stats, "m-smoe", groups=2, similarity={"a": similarity})
    assert merge.groups["a"] == (Group((0,), (9,)), Group((1, 2, 3, 4, 5), (1, 0, 0, 0, 0)))


def test_statistics_without_outputs_say_how_to_record_them() -> None:
    with pytest.raises(ReapError, match=r"outputs=True \(`reap calibrate --outputs`\)"):
        make_merge(counted(a_model(), COUNTS), ratio=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of ratio and groups"),
        ({"ratio": 0.5, "groups": 3}, "exactly one of ratio and groups"),
        ({"ratio": 1}, "at least 0 and less than 1"),
        ({"groups": 0}, "a whole number of 1 or more"),
        ({"groups": 7}, "layer a: 6 experts make no 7 groups: ask for at most 6"),
        ({"groups": 3, "method": "ties"}, "method is 'ties': it must be one of hc-smoe, m-smoe"),
        ({"groups": 3, "scope": "all"}, "scope is 'all': it must be one of layer, global"),
        ({"groups": 3, "scope": "global"}, "hc-smoe takes neither a scope nor a similarity"),
        ({"groups": 3, "method": "m-smoe"}, "m-smoe needs a similarity of experts"),
        (
            {"groups": 3, "method": "m-smoe", "similarity": {"a": torch.eye(5)}},
            r"finite numbers \[6,6\] for layer a",
        ),
        (
            {"groups": 3, "method": "m-smoe", "similarity": {"a": [[1.0]]}},
            r"a tensor of finite numbers \[6,6\] for layer a",
        ),
        (
            {"groups": 3, "method": "m-smoe", "similarity": [torch.eye(6)]},
            r"a tensor of finite numbers \[6,6\] for layer a",
        ),
        (
            {"groups": 3, "method": "m-smoe", "similarity": {"a": torch.full((6, 6), torch.nan)}},
            r"finite numbers \[6,6\] for layer a",
        ),
    ],
)
def test_what_cannot_be_asked_for(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ReapError, match=message):
        make_merge(counted(a_model(), COUNTS, POINTS), **options)


def test_a_layer_without_a_token() -> None:
    with pytest.raises(ReapError, match="layer b saw no tokens"):
        make_merge(counted(a_model(), {"a": COUNTS["a"]}), "m-smoe", groups=2, similarity={})
