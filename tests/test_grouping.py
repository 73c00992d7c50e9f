"""The grouping rules, against scipy's own cuts, brute force, and cases that can be told by hand."""

from __future__ import annotations

import builtins
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster import hierarchy

from reap.errors import ReapError
from reap.merging.grouping import Groups, around_dominant, hierarchical, shared_out


def by_definition(points: np.ndarray, groups: int) -> Groups:
    """Join the two clusters with the smallest mean distance between their members, again and
    again."""
    clusters = [[i] for i in range(len(points))]
    while len(clusters) > groups:
        a, b = min(
            combinations(range(len(clusters)), 2),
            key=lambda pair: np.mean(
                [
                    np.linalg.norm(points[i] - points[j])
                    for i in clusters[pair[0]]
                    for j in clusters[pair[1]]
                ]
            ),
        )
        clusters[a] += clusters.pop(b)
    return sorted(sorted(cluster) for cluster in clusters)


@given(st.integers(2, 9), st.integers(0, 99), st.data())
@settings(deadline=None, max_examples=60)
def test_average_linkage_by_definition(experts: int, seed: int, data: Any) -> None:
    points = np.random.default_rng(seed).normal(size=(experts, 3))
    groups = data.draw(st.integers(1, experts))
    found = hierarchical(points, np.ones(experts, dtype=np.int64), groups)
    assert found == by_definition(points, groups)
    labels = hierarchy.cut_tree(hierarchy.linkage(points, "average"), groups).ravel()
    assert found == sorted(sorted(np.flatnonzero(labels == k).tolist()) for k in set(labels))


def test_points_on_a_line() -> None:
    points = np.array([[0.0], [10.0], [0.5], [10.5], [30.0]])
    counts = np.array([1, 1, 1, 1, 1])
    assert hierarchical(points, counts, 3) == [[0, 2], [1, 3], [4]]
    assert hierarchical(points, counts, 2) == [[0, 1, 2, 3], [4]]
    assert hierarchical(points, counts, 5) == [[0], [1], [2], [3], [4]]


@pytest.mark.parametrize("groups", [1, 2, 3, 5, 7, 8])
def test_ties_make_exactly_as_many_groups_the_same_every_time(groups: int) -> None:
    """Corners of a cube, all as far from their neighbours: cut by height there would be fewer."""
    points = np.array([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)], dtype=float)
    counts = np.ones(8, dtype=np.int64)
    found = hierarchical(points, counts, groups)
    assert len(found) == groups and sorted(sum(found, [])) == list(range(8))
    assert hierarchical(points.copy(), counts, groups) == found
    same = hierarchical(np.zeros((8, 3)), counts, groups)
    assert len(same) == groups


def test_experts_without_a_token_join_the_group_with_the_most() -> None:
    points = np.array([[0.0], [0.0], [9.0], [0.1], [9.1], [0.0]])
    counts = np.array([5, 0, 40, 5, 40, 0])
    assert hierarchical(points, counts, 2) == [[0, 3], [1, 2, 4, 5]]


def test_experts_without_a_token_stay_alone_while_there_is_room() -> None:
    points = np.zeros((5, 1))
    counts = np.array([0, 7, 0, 2, 0])
    assert hierarchical(points, counts, 2) == [[0, 1, 2, 4], [3]]
    assert hierarchical(points, counts, 3) == [[0], [1, 2, 4], [3]]
    assert hierarchical(points, counts, 5) == [[0], [1], [2], [3], [4]]


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    own = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("scipy"):
            raise ImportError(name)
        return own(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ReapError, match="needs the `scipy` package: pip install scipy"):
        hierarchical(np.zeros((3, 1)), np.ones(3, dtype=np.int64), 2)


def test_the_others_join_the_dominant_expert_that_is_most_similar() -> None:
    similarity = np.eye(5)
    similarity[0, [1, 3]] = similarity[[1, 3], 0] = 0.2, 0.9
    similarity[2, [1, 3]] = similarity[[1, 3], 2] = 0.5, 0.4
    similarity[4, [1, 3]] = similarity[[1, 3], 4] = -0.5, -0.9
    counts = np.array([3, 10, 2, 20, 1])
    assert around_dominant(similarity, counts, 2) == [[0, 3], [1, 2, 4]]
    assert around_dominant(similarity, counts, 5) == [[0], [1], [2], [3], [4]]
    assert around_dominant(similarity, counts, 1) == [[0, 1, 2, 3, 4]]


def test_of_equals_the_lower_id_is_dominant_and_joined() -> None:
    assert around_dominant(np.ones((4, 4)), np.array([5, 5, 5, 5]), 2) == [[0, 2, 3], [1]]


def test_groups_shared_out_by_frequency() -> None:
    flat, steep = np.array([5, 5, 5, 5]), np.array([97, 1, 1, 1])
    assert shared_out([flat, steep], 5) == [4, 1]
    assert shared_out([steep, flat], 5) == [1, 4]
    assert shared_out([flat, steep], 2) == [1, 1]
    # Frequency is a share of a layer's slots: a layer with few tokens is not the worse for it.
    assert shared_out([flat, steep * 1000], 5) == [4, 1]
    assert shared_out([flat, flat, flat], 7) == [4, 2, 1]  # of equals the earlier layer's
