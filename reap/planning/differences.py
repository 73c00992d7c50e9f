"""How two statistics differ, or two plans: in what they are of, and in which experts go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from reap.errors import ReapError
from reap.files.kinds import kind_of
from reap.files.paths import path_of
from reap.model.info import LayerInfo, ModelInfo
from reap.planning.agreement import dropped, overlap, rank_correlation
from reap.planning.counting import Ratio, kept_counts
from reap.planning.criteria import check_criterion, saliency
from reap.planning.plan import Plan
from reap.statistics import joining
from reap.statistics.stats import Statistics

_PIECE = 1 << 20
STATISTICS, PLANS = "statistics", "plans"
CRITERION, RATIO = "reap", "0.5"  # by which statistics are compared where nothing is said


@dataclass(frozen=True)
class Difference:
    """One thing that the two do not say alike; None where one does not say it."""

    what: str
    first: Any
    second: Any


@dataclass(frozen=True)
class LayerDifference:
    """One layer of both. `rank_correlation` is of the scores (None for plans, NaN where one ranks
    nothing), `overlap` of the experts dropped; then the experts that one alone keeps."""

    rank_correlation: float | None
    overlap: float
    first_keeps: tuple[int, ...]
    second_keeps: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """`bits`: both files have the same bytes. `same`: the same sums of the same model, or plans
    that keep the same experts of it. `layers` is empty where they cannot be compared, of which
    `notes` speaks."""

    kind: str  # STATISTICS or PLANS
    bits: bool
    same: bool
    differences: list[Difference]
    layers: dict[str, LayerDifference]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "equal_bits": self.bits,
            "same": self.same,
            "differences": [vars(one) for one in self.differences],
            "layers": {name: vars(one) for name, one in self.layers.items()},
            "notes": self.notes,
        }


Comparable = Statistics | Plan | str | PathLike[str]


def compare(
    first: Comparable,
    second: Comparable,
    *,
    criterion: str | None = None,
    ratio: Ratio | None = None,
) -> Comparison:
    """How two statistics differ, or two plans; also files of them.

    Statistics are compared by the experts that `criterion` ("reap") drops at `ratio` (0.5), plans
    by those that they drop, so that neither is for them. ReapError for anything else, for one of
    each, and for a ratio that a router could not do with.
    """
    one, other = _loaded(first, "first"), _loaded(second, "second")
    bits = _same_bytes(first, second)
    if isinstance(one, Statistics) and isinstance(other, Statistics):
        return _statistics(
            one, other, bits, criterion or CRITERION, RATIO if ratio is None else ratio
        )
    if isinstance(one, Plan) and isinstance(other, Plan):
        if criterion is not None or ratio is not None:
            raise ReapError("criterion and ratio are of two statistics: plans have their own")
        return _plans(one, other, bits)
    raise ReapError("one is a plan and the other statistics: give two of a kind")


def _statistics(
    one: Statistics, other: Statistics, bits: bool, criterion: str, ratio: Ratio
) -> Comparison:
    check_criterion(criterion)
    found = [*_models(one.model, other.model)]
    found += _fields(one, other, ("gates", "tokens"))
    found += _items("", one.kinds, other.kinds)
    found += _items("tokens of domain", one.domain_tokens, other.domain_tokens)
    found += _texts(one.data, other.data)
    found += _items("", one.versions, other.versions)
    notes = one.model.notes(other.model)
    layers = {}
    fault = _incomparable(one.model, other.model)
    if fault is None:
        try:
            scores = [saliency(each, criterion) for each in (one, other)]
        except ReapError as error:
            fault = str(error)
        else:
            keep = kept_counts(one.model.layers, ratio=ratio)
            if keep == [layer.num_experts for layer in one.model.layers]:
                fault = f"ratio {ratio} drops no expert: give a larger one"
            else:
                layers = dict(_ranked(one.model.layers, keep, *(list(s.values()) for s in scores)))
    if fault is not None:
        notes.append(f"layers are not compared: {fault}")
    # By value: of one model a file of an earlier version may know less than another.
    same = bits or (not one.model.difference(other.model) and one.same_sums(other))
    return Comparison(STATISTICS, bits, same, found, layers, notes)


def _plans(one: Plan, other: Plan, bits: bool) -> Comparison:
    found = [*_models(one.model, other.model), *_fields(one, other, ("criterion", "seed"))]
    found += _items("", one.options, other.options)
    mine, theirs = dict(one.calibration), dict(other.calibration)
    data = [entries(each.pop("data", None)) for each in (mine, theirs)]
    found += _items("calibration", mine, theirs)
    found += _texts(*data)
    notes = one.model.notes(other.model)
    fault = _incomparable(one.model, other.model)
    layers = {}
    if fault is None:
        gone = [
            [set(plan.dropped[layer.name]) for layer in plan.model.layers] for plan in (one, other)
        ]
        for layer, a, b in zip(one.model.layers, *gone, strict=True):
            layers[layer.name] = _layer(None, a, b)
    else:
        notes.append(f"layers are not compared: {fault}")
    alike = all(not each.first_keeps and not each.second_keeps for each in layers.values())
    same = bits or (fault is None and alike and not one.model.difference(other.model))
    return Comparison(PLANS, bits, same, found, layers, notes)


def _ranked(
    layers: Iterable[LayerInfo], keep: Iterable[int], one: Sequence[Tensor], other: Sequence[Tensor]
) -> Iterator[tuple[str, LayerDifference]]:
    for layer, count, a, b in zip(layers, keep, one, other, strict=True):
        gone = (set(dropped(layer, scores, count)) for scores in (a, b))
        yield layer.name, _layer(rank_correlation(a, b), *gone)


def _layer(correlation: float | None, one: set[int], other: set[int]) -> LayerDifference:
    """Of the experts that each drops."""
    return LayerDifference(
        correlation, overlap(one, other), tuple(sorted(other - one)), tuple(sorted(one - other))
    )


def _incomparable(one: ModelInfo, other: ModelInfo) -> str | None:
    """Why experts of one are not those of the other, or None. Layers may have other names."""
    if len(one.layers) != len(other.layers):
        return f"{len(one.layers)} layers against {len(other.layers)}"
    for a, b in zip(one.layers, other.layers, strict=True):
        if a.num_experts != b.num_experts:
            return f"layer {a.name} has {a.num_experts} experts against {b.num_experts}"
    return None


def _models(one: ModelInfo, other: ModelInfo) -> Iterator[Difference]:
    how = one.difference(other)
    if how is not None:
        yield Difference(f"model ({how})", one.name, other.name)
    elif one.name != other.name:
        yield Difference("name of the model", one.name, other.name)


def _fields(one: object, other: object, names: Iterable[str]) -> Iterator[Difference]:
    for name in names:
        mine, theirs = getattr(one, name), getattr(other, name)
        if mine != theirs:
            yield Difference(name, mine, theirs)


def _items(what: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[Difference]:
    for name in {**one, **other}:
        if one.get(name) != other.get(name):
            yield Difference(f"{what} {name}".strip(), one.get(name), other.get(name))


def _texts(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> Iterator[Difference]:
    """Field by field where both are of one calibration, but for sources of one alone; else the
    calibrations of one alone."""
    if len(one) == len(other) == 1:
        specs = [[each.get("spec") for each in entries(e.get("sources"))] for e in (*one, *other)]
        both = [spec for spec in specs[0] if spec in specs[1]]
        mine, theirs = (_only(entry, both) for entry in (*one, *other))
        for what, a, b in joining.differences(mine, theirs):
            yield Difference(f"text: {what}", a, b)
        yield from (Difference("data", spec, None) for spec in specs[0] if spec not in both)
        yield from (Difference("data", None, spec) for spec in specs[1] if spec not in both)
        return
    for mine in one:
        if mine not in other:
            yield Difference("calibration text", _named(mine), None)
    for theirs in other:
        if theirs not in one:
            yield Difference("calibration text", None, _named(theirs))


def _only(entry: dict[str, Any], specs: list[Any]) -> dict[str, Any]:
    """The entry with no other sources than these."""
    kept = [each for each in entries(entry.get("sources")) if each.get("spec") in specs]
    return {**entry, "sources": kept}


def _named(entry: Mapping[str, Any]) -> str:
    sources = entry.get("sources")
    specs = [str(each.get("spec")) for each in entries(sources)]
    return f"{', '.join(specs) or 'unnamed'}, {entry.get('tokens', 'unknown')} tokens"


def entries(value: Any) -> list[dict[str, Any]]:
    """The objects in a list; none of anything else."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _loaded(given: Comparable, which: str) -> Statistics | Plan:
    if isinstance(given, Statistics | Plan):
        return given
    path = path_of(given, f"the {which}", "statistics, a plan, or the file of one")
    kind = kind_of(path)
    if kind == "a plan":
        return Plan.load(path)
    if kind not in (None, "statistics"):
        raise ReapError(f"{path} is {kind}: give two statistics, or two plans")
    return Statistics.load(path)


def _same_bytes(first: Comparable, second: Comparable) -> bool:
    """Of two files; False for what is in memory."""
    if not (isinstance(first, str | PathLike) and isinstance(second, str | PathLike)):
        return False
    one, other = Path(first), Path(second)
    if one.stat().st_size != other.stat().st_size:
        return False
    with open(one, "rb") as mine, open(other, "rb") as theirs:
        while piece := mine.read(_PIECE):
            if piece != theirs.read(_PIECE):
                return False
    return True
