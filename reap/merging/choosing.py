"""Statistics -> Merge: which experts become one, by a published method."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from os import PathLike

import numpy as np
from torch import Tensor

from reap.errors import ReapError
from reap.merging import grouping
from reap.merging.mergeplan import Group, Merge
from reap.model.info import LayerInfo
from reap.planning.counting import Ratio, share_of
from reap.statistics.layerstats import LayerStatistics
from reap.statistics.stats import Statistics

METHODS = ("hc-smoe", "m-smoe")
SCOPES = ("layer", "global")


def make_merge(
    stats: Statistics | str | PathLike[str],
    method: str = "hc-smoe",
    *,
    ratio: Ratio | None = None,
    groups: int | None = None,
    scope: str = "layer",
    similarity: Mapping[str, Tensor] | None = None,
) -> Merge:
    """Groups of experts by a published method, their weights the tokens that each one saw.

    Exactly one of `ratio` (of E experts E - floor(E * ratio) are left, in decimal) and `groups`
    (different experts left per layer) says how far.

    "hc-smoe" (arXiv 2410.08589) clusters mean expert outputs hierarchically, with average linkage
    and Euclidean distance. The mean is over the tokens that were routed to the expert
    (`output_sum` / `count`), where its authors run every expert on every token.
    "m-smoe" (arXiv 2310.01334) gathers around the most frequent experts those that are most similar
    to them by `similarity`, layer -> [E,E], higher is more alike. Its authors take the cosine
    between two experts' router logits over the calibration text, or between their rows of the
    router, which `router_similarity` reads off a model's files. Its scope "global" shares the
    groups out over the layers by frequency, as its authors do; "layer" gives all layers as many.

    Neither aligns the inner channels of experts before they are averaged, as M-SMoE may. An expert
    without a token has weight 0; one that would be merged with such alone keeps its own weights.
    ReapError for statistics without what the method needs, and for numbers that cannot be met.
    """
    stats = Statistics.of(stats)
    for what, given, known in (("method", method, METHODS), ("scope", scope, SCOPES)):
        if given not in known:
            raise ReapError(f"{what} is {given!r}: it must be one of {', '.join(known)}")
    if method == "hc-smoe" and (scope != "layer" or similarity is not None):
        raise ReapError(
            "hc-smoe takes neither a scope nor a similarity: it clusters the outputs of each layer"
        )
    layers = [stats.layer(layer.name) for layer in stats.model.layers]
    for its in layers:
        if not its.tokens:
            raise ReapError(f"layer {its.name} saw no tokens: calibrate on more text to merge by")
    numbers = _numbers(stats.model.layers, ratio, groups)
    if scope == "global":
        numbers = grouping.shared_out([its.count.numpy() for its in layers], sum(numbers))
    found = {}
    for its, number in zip(layers, numbers, strict=True):
        counts = its.count.numpy()
        if method == "hc-smoe":
            members = grouping.hierarchical(_means(its), counts, number)
        else:
            members = grouping.around_dominant(_alike(its, similarity), counts, number)
        found[its.name] = tuple(_group(ids, counts) for ids in members)
    return Merge(
        model=stats.model,
        method=method,
        groups=found,
        options={
            "ratio": None if ratio is None else str(ratio),
            "groups": groups,
            "scope": scope,
            "weights": "count",
        },
        calibration=stats.origin(),
    )


def _numbers(layers: Iterable[LayerInfo], ratio: Ratio | None, groups: int | None) -> list[int]:
    if (ratio is None) == (groups is None):
        raise ReapError("say how much to merge with exactly one of ratio and groups")
    if ratio is not None:
        share = share_of(ratio)
        return [its.num_experts - math.floor(its.num_experts * share) for its in layers]
    if type(groups) is not int or groups < 1:
        raise ReapError(f"groups is {groups!r}: it must be a whole number of 1 or more")
    for layer in layers:
        if groups > layer.num_experts:
            raise ReapError(
                f"layer {layer.name}: {layer.num_experts} experts make no {groups} groups: ask for "
                f"at most {layer.num_experts}"
            )
    return [groups for _ in layers]


def _means(layer: LayerStatistics) -> np.ndarray:
    """The mean output of every expert [E,H] fp64, zero where it has no token."""
    outputs = layer.output_sum
    if outputs is None:
        raise ReapError(
            f"layer {layer.name}: these statistics hold no expert outputs, which hc-smoe clusters: "
            "calibrate with outputs=True (`reap calibrate --outputs`)"
        )
    return (outputs / layer.count.clamp(min=1)[:, None]).numpy()


def _alike(layer: LayerStatistics, similarity: Mapping[str, Tensor] | None) -> np.ndarray:
    if similarity is None:
        raise ReapError(
            "m-smoe needs a similarity of experts: give similarity=reap.router_similarity(folder) "
            "(`reap group --model MODEL`)"
        )
    E = layer.num_experts
    given = similarity.get(layer.name) if isinstance(similarity, Mapping) else None
    if (
        not isinstance(given, Tensor)
        or tuple(given.shape) != (E, E)
        or not bool(given.isfinite().all())
    ):
        raise ReapError(
            f"similarity must have a tensor of finite numbers [{E},{E}] for layer {layer.name}"
        )
    return given.double().cpu().numpy()


def _group(ids: list[int], counts: np.ndarray) -> Group:
    weights = [int(counts[i]) for i in ids]
    if not any(weights):
        # No token says which of them matters: the first, the dominant one, stays as it is.
        weights[0] = 1
    return Group(tuple(ids), tuple(weights))
