"""`reap score`: the score of every expert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from reap.app.arguments import Criterion, Domains, Json, Seed, Stats, load_statistics
from reap.app.console import print_json, print_table, reports_errors
from reap.files.units import counted
from reap.model.layernames import pattern, short_names

if TYPE_CHECKING:
    from torch import Tensor

    from reap.statistics.stats import Statistics

FEW = 100  # tokens, below which an expert is named


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
    """Print the scores of every layer's experts.

    The ends and the middle, and which experts saw too few tokens; with --all every one.

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
    title = f"{criterion}, {counted(loaded.tokens, 'token')}; layer: {pattern(list(scores))}"
    if all:
        columns = ["layer", "expert", "score", "\u00b1", "tokens"]
        print_table(title, columns, list(_every(loaded, scores, criterion)))
        return
    rows = [[short, *_ends(scores[layer])] for layer, short in short_names(list(scores)).items()]
    columns = ["layer", "weakest", "second", "third", "median", "strongest"]
    print_table(f"{title}\nexpert: score (--all: every expert, and its error)", columns, rows)
    for line in _too_few(loaded):
        typer.echo(line)


def _ends(scores: Tensor) -> list[str]:
    """The weakest three, the middle and the strongest."""
    order = scores.argsort(stable=True).tolist()
    fill = [order[-1]] * (3 - len(order))  # of a layer with fewer experts than columns
    picks = [*order[:3], *fill, order[len(order) // 2], order[-1]]
    return [f"{expert}: {_shown(float(scores[expert]))}" for expert in picks]


def _too_few(stats: Statistics) -> list[str]:
    """A line per layer with experts that saw too few tokens to be judged, and one above them."""
    from reap.planning.criteria import under_sampled
    from reap.report.wording import ranges

    few, short = under_sampled(stats, FEW), short_names(stats.layers)
    lines = [f"layer {short[layer]}: {ranges(experts, 8)}" for layer, experts in few.items()]
    above = f"fewer than {FEW} tokens, too few to judge these experts by:"
    return [above, *lines] if lines else []


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
