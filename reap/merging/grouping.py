"""Which experts become one: the grouping rules of two published methods, on plain arrays.

Every function takes the experts of one layer and returns groups of ids that cover all of them once,
each ascending, in the order of their first ids. Of equals the lower id wins.
"""

from __future__ import annotations

import numpy as np

from reap.errors import ReapError

Groups = list[list[int]]


def hierarchical(points: np.ndarray, counts: np.ndarray, groups: int) -> Groups:
    """HC-SMoE (arXiv 2410.08589): agglomerative clustering with average linkage and Euclidean
    distance, until `groups` clusters are left.

    points [E,H] fp64: the mean output of each expert; counts [E]: its tokens. An expert without a
    token has no mean: it joins the group that got the most tokens, where its weight is zero, or
    stays alone while there are fewer experts with tokens than groups.
    """
    seen = np.flatnonzero(counts > 0)
    unseen = np.flatnonzero(counts == 0)
    if len(seen) <= groups:
        alone = groups - len(seen)
        found = [[int(e)] for e in (*seen, *unseen[:alone])]
        rest = unseen[alone:]
    else:
        found = [[int(seen[i]) for i in cluster] for cluster in _clusters(points[seen], groups)]
        rest = unseen
    if len(rest):
        largest = max(found, key=lambda group: (int(counts[group].sum()), -min(group)))
        largest.extend(map(int, rest))
    return _ordered(found)


def _clusters(points: np.ndarray, groups: int) -> Groups:
    """The tree of scipy, cut where `groups` clusters are left: exactly as many, also where several
    joins have the same height."""
    try:
        from scipy.cluster import hierarchy
    except ImportError:
        raise ReapError("hc-smoe needs the `scipy` package: pip install scipy") from None
    joins = hierarchy.linkage(points, method="average", metric="euclidean")
    clusters = {i: [i] for i in range(len(points))}
    for step, (a, b) in enumerate(joins[: len(points) - groups, :2].astype(int)):
        clusters[len(points) + step] = clusters.pop(a) + clusters.pop(b)
    return list(clusters.values())


def around_dominant(similarity: np.ndarray, counts: np.ndarray, groups: int) -> Groups:
    """M-SMoE (arXiv 2310.01334): the `groups` most frequent experts are dominant, and every other
    joins the dominant one that it is most similar to.

    similarity [E,E]: higher is more alike; counts [E]: tokens of each expert.
    """
    order = np.lexsort((np.arange(len(counts)), -counts))
    dominant = np.sort(order[:groups])
    found = {int(e): [int(e)] for e in dominant}
    for expert in order[groups:]:
        nearest = dominant[int(np.argmax(similarity[expert, dominant]))]
        found[int(nearest)].append(int(expert))
    return _ordered(list(found.values()))


def shared_out(counts: list[np.ndarray], groups: int) -> list[int]:
    """How many groups each layer gets when the layers share `groups`: as many as it has of the most
    frequent experts of all layers (M-SMoE's adaptive rule), and at least one.

    Frequency is an expert's share of its layer's slots; of equals the earlier layer's comes first.
    """
    shares = [each / max(1, each.sum()) for each in counts]
    layer = np.repeat(np.arange(len(counts)), [len(each) for each in counts])
    first = np.concatenate([np.arange(len(each)) != int(np.argmax(each)) for each in counts])
    order = np.lexsort((np.arange(len(layer)), -np.concatenate(shares), first))
    return np.bincount(layer[order[:groups]], minlength=len(counts)).tolist()


def _ordered(groups: Groups) -> Groups:
    return sorted((sorted(group) for group in groups), key=lambda group: group[0])
