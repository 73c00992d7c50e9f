"""Which figures a report has, in its order, each with what it shows in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from reap.report import comparisons, figures, measured
from reap.report.cochosen import Cochosen
from reap.report.evidence import FEW, SURE, Agreement, Evidence
from reap.report.measured import Cost
from reap.report.texts import Run
from reap.report.wording import letter, plain

MOST = 16  # rankings, plans or sources in one figure; a table has the others


@dataclass(frozen=True)
class Drawing:
    """`draw(theme, *given)` is the figure called `name`, which shows `said`."""

    name: str
    draw: Callable[..., Figure]
    given: tuple[Any, ...]
    said: str


def drawings(
    seen: Evidence, together: Cochosen | None, runs: Sequence[Run], costs: Sequence[Cost]
) -> Iterator[Drawing]:
    """All that there is something to draw for."""
    labels, first = seen.labels, seen.first
    for at, cut in enumerate(seen.cuts):
        yield Drawing(
            f"heatmap-{letter(at).lower()}",
            figures.heatmap,
            (labels, cut.scores, cut.dropped),
            f"{cut.criterion} score of every expert in every layer, against the median of its "
            f"layer; what {cut.name} drops is underlined",
        )
    yield Drawing(
        "distribution",
        figures.spread,
        (labels, first.scores, first.dropped, f"{first.criterion} score"),
        f"how the {first.criterion} scores spread in every layer, of the experts that {first.name} "
        "drops and of those that it keeps",
    )
    yield from _agreements("criteria", labels, seen.criteria)
    if seen.domains is not None:
        yield from _agreements("domains", labels, seen.domains)
    gaps = {cut.name: cut.gaps for cut in seen.cuts[:MOST]}
    if any(width == width for widths in gaps.values() for width in widths):
        yield Drawing(
            "certainty",
            figures.certainty,
            (labels, gaps, SURE),
            "standard errors between the weakest expert kept and the strongest dropped, per layer "
            f"and plan; below {SURE:g} more text may swap them",
        )
    counts = [layer.count.double() for layer in seen.layers]
    yield Drawing(
        "routed",
        figures.spread,
        (labels, counts, first.dropped, "tokens per expert", float(FEW)),
        f"how many tokens the experts of every layer saw; a line at {FEW}",
    )
    if together is not None:
        named = [labels[at] for at in together.layers]
        yield Drawing(
            "coselection",
            figures.coselection,
            (named, together.lifts, together.dropped),
            f"for the layers {', '.join(named)}: how often tokens chose two experts together, "
            "against how often each is chosen",
        )
    yield from _composition(runs)
    plans, domains, found = measured.tables(list(costs))
    if found:
        cut_to = {what: table[:MOST] for what, table in found.items()}
        yield Drawing(
            "cost",
            comparisons.costs,
            ([plain(plan, 32) for plan in plans[:MOST]], domains, cut_to),
            f"per plan and domain: {' and '.join(found)}",
        )


def _agreements(name: str, labels: Sequence[str], of: Agreement) -> Iterator[Drawing]:
    names = [plain(each, 18) for each in of.names[:MOST]]
    N = len(names)
    what = "text" if name == "domains" else "criteria"
    yield Drawing(
        name,
        comparisons.agreement,
        (names, of.correlation[:N, :N], of.shared[:N, :N]),
        f"how far rankings by different {what} agree: rank correlation, and the share of dropped "
        "experts in common, of each with each",
    )
    yield Drawing(
        f"{name}-by-layer",
        comparisons.by_layer,
        (labels, names, of.by_layer[:N]),
        f"the share of dropped experts in common with {names[0]}, per layer",
    )


def _composition(runs: Sequence[Run]) -> Iterator[Drawing]:
    found = [
        (source.spec, source.domain, source.counted or source.tokens or 0)
        for run in runs
        for source in run.sources
    ]
    found = [each for each in sorted(found, key=lambda each: -each[2]) if each[2]][:MOST]
    if found:
        domains = list(dict.fromkeys(domain for _, domain, _ in found))
        yield Drawing(
            "composition",
            comparisons.composition,
            (
                [plain(spec, 36) for spec, _, _ in found],
                [tokens for *_, tokens in found],
                [domains.index(domain) for _, domain, _ in found],
                [plain(domain, 24) for domain in domains],
            ),
            "tokens that count, of each source of the calibration text, coloured by domain",
        )
