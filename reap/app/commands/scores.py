"""`reap score`: the score of every expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reap.app.arguments import (
    Criterion,
    Domains,
    Json,
    Seed,
    Stats,
    load_statistics,
)
from reap.app.console import print_json, print_table, reports_errors

if TYPE_CHECKING:
    import torch


@reports_errors
def score(
    stats: Stats,
    criterion: Criterion = "reap",
    domain: Domains = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Print the score of every expert.

    Criteria: reap, frequency, ean, ean_mean, weighted_ean, gate_mass, reap_l2, peak, random.
    """
    from reap.planning.criteria import saliency, standard_errors

    loaded = load_statistics(stats, domain)
    scores = saliency(loaded, criterion, seed=seed)
    errors = standard_errors(loaded, criterion)
    if json:
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
    rows = [[layer, *_ranked(values, errors[layer])] for layer, values in scores.items()]
    print_table(
        f"{criterion}, {loaded.tokens:,} tokens (expert: score ± standard error)",
        ["layer", "weakest", "second", "third", "median", "strongest"],
        rows,
    )


def _ranked(scores: torch.Tensor, errors: torch.Tensor) -> list[str]:
    order = scores.argsort(stable=True).tolist()
    fill = [order[-1]] * (3 - len(order))  # of a layer with fewer experts than columns
    picks = [*order[:3], *fill, order[len(order) // 2], order[-1]]
    shown = ["" if error != error else f" ± {error:.2g}" for error in errors.tolist()]
    return [f"{expert}: {scores[expert]:.4g}{shown[expert]}" for expert in picks]
