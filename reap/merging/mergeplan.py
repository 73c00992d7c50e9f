"""Which experts become one: statistics -> Merge, safe by construction and frozen as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor

from reap.errors import ReapError
from reap.files.atomic import write_file
from reap.files.kinds import kind_of
from reap.files.outputs import MERGE, check_file
from reap.files.paths import path_of
from reap.files.safefile import parse_json, read_json
from reap.merging import grouping
from reap.model.info import LayerInfo, ModelInfo
from reap.planning.counting import Ratio, share_of
from reap.statistics.layerstats import LayerStatistics
from reap.statistics.stats import Statistics

VERSION = 1
METHODS = ("hc-smoe", "m-smoe")
SCOPES = ("layer", "global")


@dataclass(frozen=True)
class Group:
    """Experts, ascending, that all become sum of weights[i] * experts[i] / sum of weights."""

    experts: tuple[int, ...]
    weights: tuple[float, ...]  # finite, not negative, not all zero

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights, adding up to 1."""
        total = math.fsum(self.weights)
        return tuple(weight / total for weight in self.weights)


@dataclass(frozen=True)
class Merge:
    """Groups of experts that become one, in every MoE layer of `model`.

    `groups` maps every layer's name to groups that cover its experts once, in the order of their
    first ids. The router is left alone: it keeps an output per expert, so that the gates of a
    group's experts add up. `options` and `calibration` are free-form JSON, as of a plan. ReapError
    on creation when the layers are not the model's, or the groups do not cover the experts.
    """

    model: ModelInfo
    method: str
    groups: Mapping[str, tuple[Group, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.model.layers]
        if set(self.groups) != set(names):
            odd = sorted(set(self.groups) ^ set(names))[0]
            where = "the model but not the merge" if odd in names else "the merge but not the model"
            raise ReapError(f"a merge must cover the model's MoE layers: {odd!r} is in {where}")
        for layer in self.model.layers:
            _check_groups(layer, self.groups[layer.name])
        groups = {name: tuple(self.groups[name]) for name in names}
        object.__setattr__(self, "groups", MappingProxyType(groups))

    def __repr__(self) -> str:
        counts = {(layer.num_experts, len(self.groups[layer.name])) for layer in self.model.layers}
        told = ", ".join(f"{experts} to {left}" for experts, left in sorted(counts))
        return (
            f"<Merge of {self.model.name} by {self.method}: {told} experts in "
            f"{len(self.groups)} layers>"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles, which cannot have a read-only view of a mapping."""
        return _made, ({**vars(self), "groups": dict(self.groups)},)

    @property
    def left(self) -> dict[str, int]:
        """How many different experts each layer has afterwards."""
        return {name: len(groups) for name, groups in self.groups.items()}

    def to_json(self) -> str:
        """The merge as JSON text."""
        layers = {
            name: [{"experts": list(g.experts), "weights": list(g.weights)} for g in groups]
            for name, groups in self.groups.items()
        }
        about = {
            "format": MERGE,
            "version": VERSION,
            "model": self.model.to_json(),
            "method": self.method,
            "layers": layers,
            "options": dict(self.options),
            "calibration": dict(self.calibration),
        }
        return json.dumps(about, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Merge:
        """The inverse of `to_json`. ReapError for anything else."""
        data = parse_json(text.encode(errors="surrogatepass"), "the merge")
        return cls._from_object(data, "the merge")

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Write `to_json`, whole or not at all. ReapError if `path` exists or cannot be written.

        `overwrite` replaces a merge alone.
        """
        path_of(path, "path", "the file to write")
        check_file(path, MERGE, overwrite=overwrite)
        write_file(path, self.to_json().encode(), overwrite=overwrite)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Merge:
        """Read what `save` wrote. ReapError for anything else."""
        path = path_of(path, "the merge", "a merge, or the file of one")
        kind = kind_of(path)
        if kind not in (None, "a merge"):
            raise ReapError(f"{path} is {kind}, not a merge: give the file that `reap group` wrote")
        return cls._from_object(read_json(path), str(path))

    @classmethod
    def of(cls, given: Merge | str | PathLike[str]) -> Merge:
        """A merge as it is, or the one in a file. ReapError for anything else."""
        return given if isinstance(given, cls) else cls.load(given)  # type: ignore[arg-type]

    @classmethod
    def _from_object(cls, data: dict[str, Any], where: str) -> Merge:
        if data.get("format") != MERGE:
            raise ReapError(f"{where} is no merge: its format is {data.get('format')!r}")
        if data.get("version") != VERSION:
            raise ReapError(
                f"{where} has version {data.get('version')!r}: this program reads version {VERSION}"
            )
        for name, kind in {
            "method": str, "layers": dict, "options": dict, "calibration": dict
        }.items():  # fmt: skip
            if type(data.get(name)) is not kind:
                raise ReapError(f"{where}: field {name!r} must be a JSON {kind.__name__}")
        try:
            return cls(
                model=ModelInfo.from_json(data.get("model")),
                method=data["method"],
                groups={name: _read(name, entry) for name, entry in data["layers"].items()},
                options=data["options"],
                calibration=data["calibration"],
            )
        except ReapError as error:
            raise ReapError(f"{where}: {error}") from error


def _made(fields: dict[str, Any]) -> Merge:
    return Merge(**fields)


def _read(name: str, entry: Any) -> tuple[Group, ...]:
    if isinstance(entry, list):
        groups = [group for group in entry if isinstance(group, dict)]
        if len(groups) == len(entry) and all(
            set(group) == {"experts", "weights"} and all(type(v) is list for v in group.values())
            for group in groups
        ):
            return tuple(Group(tuple(g["experts"]), tuple(g["weights"])) for g in groups)
    raise ReapError(f"layer {name!r} must be a list of objects of the lists experts and weights")


def _check_groups(layer: LayerInfo, groups: Iterable[Group]) -> None:
    found: list[int] = []
    first = -1
    for group in groups:
        ids = list(group.experts)
        for expert in ids:
            if type(expert) is not int or not 0 <= expert < layer.num_experts:
                raise ReapError(
                    f"layer {layer.name}: expert {expert!r} of a group must be an id from 0 to "
                    f"{layer.num_experts - 1}"
                )
        if not ids or ids != sorted(set(ids)) or ids[0] <= first:
            raise ReapError(
                f"layer {layer.name}: groups must ascend by their first expert, and the experts of "
                "each without repeats"
            )
        first = ids[0]
        found += ids
        if len(group.weights) != len(ids) or not _are_weights(group.weights):
            raise ReapError(
                f"layer {layer.name}: the weights of experts {ids[:4]} must be {len(ids)} finite "
                "numbers of 0 or more, one of them more than 0"
            )
    if sorted(found) != list(range(layer.num_experts)):
        raise ReapError(
            f"layer {layer.name}: groups must hold each of its {layer.num_experts} experts once"
        )


def _are_weights(weights: Iterable[Any]) -> bool:
    values = list(weights)
    numbers = all(type(w) in (int, float) and 0 <= w < math.inf for w in values)
    return numbers and 0 < math.fsum(values) < math.inf


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
        calibration={
            "tokens": stats.tokens,
            "domains": stats.domain_tokens,
            "gates": stats.gates,
            "data": stats.data,
            "statistics": stats.digest(),
            "versions": stats.versions,
        },
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
    outputs = getattr(layer, "output_sum", None)
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
    given = similarity.get(layer.name)
    if given is None or tuple(given.shape) != (E, E) or not bool(given.isfinite().all()):
        raise ReapError(f"similarity must have finite numbers [{E},{E}] for layer {layer.name}")
    return given.double().cpu().numpy()


def _group(ids: list[int], counts: np.ndarray) -> Group:
    weights = [int(counts[i]) for i in ids]
    if not any(weights):
        # No token says which of them matters: the first, the dominant one, stays as it is.
        weights[0] = 1
    return Group(tuple(ids), tuple(weights))
