"""Statistics and plans -> the numbers that a report shows, each computed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from reap.errors import ReapError
from reap.model.info import LayerInfo
from reap.model.layernames import pattern, short_names
from reap.planning.agreement import dropped, overlaps, rank_correlations
from reap.planning.counting import kept_counts
from reap.planning.criteria import (
    CRITERIA,
    check_criterion,
    gap,
    layer_errors,
    layer_scores,
    observed,
)
from reap.planning.plan import Plan
from reap.report.wording import distinct, plain
from reap.statistics.layerstats import LayerStatistics
from reap.statistics.stats import Statistics

FEW = 100  # tokens, below which an expert is judged by too little
SURE = 2.0  # standard errors between the weakest expert kept and the strongest dropped
LABEL = 24  # letters of a name in a figure
ALL_TEXT = "all text"


@dataclass(frozen=True, eq=False)
class Layer:
    """One MoE layer, over all domains."""

    info: LayerInfo
    label: str
    sums: LayerStatistics
    count: Tensor  # [E] int64


@dataclass(frozen=True, eq=False)
class Cut:
    """What a plan does. Lists have an entry per layer."""

    name: str
    plan: Plan
    given: bool  # a file; otherwise made for the report
    criterion: str  # of the scores
    scores: list[Tensor]  # [E] fp64 each
    errors: list[Tensor]  # [E] fp64 each, NaN where there is none
    dropped: list[tuple[int, ...]]
    gaps: list[float]  # in standard errors, as `reap.planning.criteria.gap`
    notes: list[str]

    @property
    def unsure(self) -> list[int]:
        """Layers whose gap is not SURE."""
        return [at for at, width in enumerate(self.gaps) if abs(width) < SURE]


@dataclass(frozen=True, eq=False)
class Agreement:
    """How far N rankings agree, of which the first is what the others are compared with. Means are
    over the layers that both rank; NaN where there is none."""

    names: list[str]
    correlation: Tensor  # [N,N] mean rank correlation
    shared: Tensor  # [N,N] mean overlap of the experts dropped
    by_layer: Tensor  # [N,L] the overlap with the first
    chance: float  # what unrelated rankings share


@dataclass(frozen=True, eq=False)
class Evidence:
    stats: Statistics
    digest: str
    layers: list[Layer]
    pattern: str  # of the layers' names
    cuts: list[Cut]
    criteria: Agreement
    domains: Agreement | None  # None where there is one domain

    @property
    def first(self) -> Cut:
        return self.cuts[0]

    @property
    def labels(self) -> list[str]:
        return [layer.label for layer in self.layers]

    @property
    def few(self) -> list[list[int]]:
        """Per layer the experts with fewer than FEW tokens."""
        return [(layer.count < FEW).nonzero().flatten().tolist() for layer in self.layers]

    @property
    def unrouted(self) -> list[list[int]]:
        """Per layer the experts without a token."""
        return [(layer.count == 0).nonzero().flatten().tolist() for layer in self.layers]


def gather(
    stats: Statistics,
    plans: Mapping[str, Plan],
    *,
    criterion: str = "reap",
    ratio: float | str = 0.5,
) -> Evidence:
    """What `stats` and the plans, by name, have to say. Without plans, of the one that `criterion`
    and `ratio` make. ReapError for statistics without tokens and plans of another model."""
    check_criterion(criterion)
    if not stats.tokens:
        raise ReapError(
            f"these statistics of {stats.model.name} are of 0 tokens: there is nothing to report; "
            "calibrate on text first"
        )
    for name, plan in plans.items():
        different = stats.model.difference(plan.model, to_prune=True)
        if different:
            raise ReapError(f"{name} is a plan of another model than the statistics: {different}")
    short = short_names(stats.layers)
    layers = [
        Layer(stats.model.layer(name), plain(short[name], LABEL), sums, sums.count)
        for name, sums in observed(stats)
    ]
    digest = stats.digest()
    cuts = [_cut(stats, digest, layers, name, plan, criterion) for name, plan in plans.items()]
    if not cuts:
        plan = _own_plan(stats, layers, criterion, ratio)
        name = f"{criterion} at {ratio}"
        cuts = [_cut(stats, digest, layers, name, plan, criterion, given=False)]
    return Evidence(
        stats,
        digest,
        layers,
        pattern(stats.layers),
        cuts,
        _criteria(layers, cuts[0]),
        _domains(stats, layers, cuts[0]) if len(stats.domains) > 1 else None,
    )


def _own_plan(
    stats: Statistics, layers: Sequence[Layer], criterion: str, ratio: float | str
) -> Plan:
    """What `make_plan` keeps, from layers that are summed already."""
    counts = kept_counts(stats.model.layers, ratio=ratio)
    if counts == [layer.num_experts for layer in stats.model.layers]:
        raise ReapError(f"ratio {ratio} drops no expert: give a larger one")
    kept = {}
    for layer, count in zip(layers, counts, strict=True):
        gone = dropped(layer.info, layer_scores(layer.sums, criterion), count)
        kept[layer.info.name] = tuple(sorted({*range(layer.info.num_experts)} - {*gone}))
    return Plan(stats.model, criterion, 0, kept, {"ratio": str(ratio)})


def _cut(
    stats: Statistics,
    digest: str,
    layers: Sequence[Layer],
    name: str,
    plan: Plan,
    criterion: str,
    *,
    given: bool = True,
) -> Cut:
    # Of two releases of transformers layers may have other names; their order is the same.
    dropped_by = plan.dropped
    gone = [dropped_by[layer.name] for layer in plan.model.layers]
    notes = list(plan.notes)
    if plan.criterion in CRITERIA:
        criterion = plan.criterion
    else:
        notes.append(
            f"its criterion {plan.criterion!r} is not known here: shown by the scores of "
            f"{criterion}"
        )
    made_of = plan.calibration.get("statistics")
    if given and made_of != digest:
        notes.append("made from other statistics than these" if made_of else "says not from what")
    notes += plan.model.notes(stats.model)
    scores = [layer_scores(layer.sums, criterion, plan.seed) for layer in layers]
    errors = [layer_errors(layer.sums, criterion) for layer in layers]
    gaps = [
        gap(score, error, set(range(len(score))) - set(out))
        for score, error, out in zip(scores, errors, gone, strict=True)
    ]
    return Cut(name, plan, given, criterion, scores, errors, gone, gaps, notes)


def _criteria(layers: Sequence[Layer], cut: Cut) -> Agreement:
    names = [cut.criterion, *(name for name in CRITERIA if name != cut.criterion)]

    def scores(at: int) -> Iterator[Tensor]:
        sums: Any = _Once(layers[at].sums)
        return (layer_scores(sums, name, cut.plan.seed) for name in names)

    return _agreement(layers, cut, names, scores)


def _domains(stats: Statistics, layers: Sequence[Layer], cut: Cut) -> Agreement:
    def scores(at: int) -> Iterator[Tensor | None]:
        yield cut.scores[at]
        for domain in stats.domains:
            sums = stats.layer(layers[at].info.name, domain)
            yield layer_scores(sums, cut.criterion, cut.plan.seed) if sums.tokens else None

    names = distinct([ALL_TEXT, *stats.domains])
    return _agreement(layers, cut, names, scores)


def _agreement(
    layers: Sequence[Layer],
    cut: Cut,
    names: list[str],
    scores: Callable[[int], Iterator[Tensor | None]],
) -> Agreement:
    """Of rankings at as many experts as the cut keeps."""
    N = len(names)
    correlation = torch.full((len(layers), N, N), math.nan, dtype=torch.float64)
    shared = correlation.clone()
    for at, layer in enumerate(layers):
        keep = layer.info.num_experts - len(cut.dropped[at])
        found = [(i, each) for i, each in enumerate(scores(at)) if each is not None]
        there = torch.tensor([i for i, _ in found])
        ranked = [each for _, each in found]
        place = at, there[:, None], there
        correlation[place] = rank_correlations(ranked)
        shared[place] = overlaps([dropped(layer.info, each, keep) for each in ranked])
    chance = fmean(
        len(out) / layer.info.num_experts for out, layer in zip(cut.dropped, layers, strict=True)
    )
    return Agreement(
        names, correlation.nanmean(0), shared.nanmean(0), shared[:, 0].T.contiguous(), chance
    )


class _Once:
    """Statistics of a layer whose sums are rounded once, not for every criterion."""

    def __init__(self, sums: LayerStatistics) -> None:
        self._sums = sums

    def __getattr__(self, field: str) -> Any:
        value = getattr(self._sums, field)
        setattr(self, field, value)
        return value
