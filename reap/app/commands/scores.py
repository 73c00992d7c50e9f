"""`reap score`: the score of every expert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from reap.app.arguments import Criterion, Domains, Json, Seed, Stats, load_statistics
from reap.app.console import print_json, print_table, reports_errors

if TYPE_CHECKING:
    from torch import Tensor

    from reap.statistics.stats import Statistics


@reports_errors
def score(
    stats: Stats,
    criterion: Criterion = "reap",
    domain: Domains = None,
    seed: Seed = 0,
    all: Annotated[
        bool, typer.Option("--all", help="every expert, with standard error and tokens")
    ] = False,
    json: Json = False,
) -> None:
    """Print the scores of experts: of every layer the ends and the middle.

    Criteria: reap, frequency, ean, ean_mean, weighted_ean, gate_mass, reap_l2, peak, random.
    """
    from reap.planning.criteria import saliency, standard_errors

    loaded = load_statistics(stats, domain)
    scores = saliency(loaded, criterion, seed=seed)
    if json:
        errors = standard_errors(loaded, criterion)
        layers = {
            layer: {
                "scores": scores[layer].tolist(),
                "standard_errors": errors[layer].tolist(),
                "counts": loaded[layer].count.tolist(),
            }
            for layer in scores
        }
        print_json({"criterion": criterion, "tokens": loaded.tokens, "layers": layers})
        return
    title = f"{criterion}, {loaded.tokens:,} tokens; layer: {pattern(list(scores))}"
    if all:
        columns = ["layer", "expert", "score", "\u00b1", "tokens"]
        print_table(title, columns, list(_every(loaded, scores, criterion)))
        return
    rows = [[short, *_ends(scores[layer])] for layer, short in short_names(list(scores)).items()]
    columns = ["layer", "weakest", "second", "third", "median", "strongest"]
    print_table(f"{title}\nexpert: score (--all: every expert, and its error)", columns, rows)


def _ends(scores: Tensor) -> list[str]:
    """The weakest three, the middle and the strongest."""
    order = scores.argsort(stable=True).tolist()
    fill = [order[-1]] * (3 - len(order))  # of a layer with fewer experts than columns
    picks = [*order[:3], *fill, order[len(order) // 2], order[-1]]
    return [f"{expert}: {_shown(float(scores[expert]))}" for expert in picks]


def _every(stats: Statistics, scores: dict[str, Tensor], criterion: str) -> Iterator[list[str]]:
    """Layer by layer, weakest first."""
    from reap.planning.criteria import standard_errors

    errors = standard_errors(stats, criterion)
    for layer, short in short_names(list(scores)).items():
        counts, ranked = stats[layer].count.tolist(), scores[layer].argsort(stable=True)
        for expert in ranked.tolist():
            error = float(errors[layer][expert])
            shown = "" if error != error else f"{error:.2g}"
            score = f"{float(scores[layer][expert]):.4g}"
            yield [short, str(expert), score, shown, f"{counts[expert]:,}"]


def _shown(score: float) -> str:
    """In seven characters, or eight of a whole number."""
    if score == round(score) and abs(score) < 1e7:
        return f"{score:.0f}"
    text = f"{score:.3g}"
    return f"{score:.1e}" if "e" in text else text


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names of layers without the parts that all of them share."""
    first, last = _shared(names)
    return {
        name: ".".join(parts[first : len(parts) - last]) or name
        for name in names
        if (parts := name.split("."))
    }


def pattern(names: Sequence[str]) -> str:
    """The parts that they share, and N for the others."""
    first, last = _shared(names)
    parts = names[0].split(".")
    return ".".join([*parts[:first], "N", *parts[len(parts) - last :]])


def _shared(names: Sequence[str]) -> tuple[int, int]:
    """How many parts all names share at the beginning and at the end; of one, all around its
    number."""
    split = [name.split(".") for name in names]
    if len(split) == 1:  # as if there were another layer
        split.append(["" if part.isdigit() else part for part in split[0]])
    shortest = min(map(len, split))
    first = 0
    while first < shortest - 1 and len({parts[first] for parts in split}) == 1:
        first += 1
    last = 0
    while last < shortest - first - 1 and len({parts[-1 - last] for parts in split}) == 1:
        last += 1
    return first, last
