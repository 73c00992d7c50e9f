"""How alike the experts of a layer are, by recorded statistics: for methods that merge."""

from __future__ import annotations

from os import PathLike

import torch
from torch import Tensor

from reap.errors import ReapError
from reap.statistics.layerstats import LayerStatistics
from reap.statistics.stats import Statistics

# What is compared -> how it is recorded.
RECORDED = {
    "gated_outputs": "outputs",
    "outputs": "outputs",
    "logits": "logits",
    "centred_logits": "logits",
}


def similarity(
    stats: Statistics | str | PathLike[str], of: str = "gated_outputs"
) -> dict[str, Tensor]:
    """Cosines between the experts of every layer, {layer: [E,E] fp64}, NaN for an expert of which
    there is nothing to compare.

    of: "gated_outputs" and "outputs" compare mean vectors, of g f(x) and of f(x) over the tokens
    that chose the expert. That is the cosine of two means; REAM (arXiv 2604.04356) takes the mean
    over all tokens of the cosine of two outputs, for which every expert must run on every token.
    "logits" compares columns of the router's logits over all tokens, sum(l_i l_j) / sqrt(sum(l_i^2)
    sum(l_j^2)), as REAM does; "centred_logits" are less their means: correlations.

    ReapError for statistics without these, and for a layer whose router does not show its logits.
    """
    if of not in RECORDED:
        raise ReapError(f"similarity of {of!r}: it must be one of {', '.join(RECORDED)}")
    given = Statistics.of(stats)
    option = RECORDED[of]
    if not given.kinds[option]:
        raise ReapError(
            f"similarity of {of} needs statistics with {option}: record them with "
            f"observe({option}=True), or reap calibrate --{option}"
        )
    found = {}
    for name in given.layers:
        products = _products(given.layer(name), of)
        if products is None:
            raise ReapError(f"layer {name}: its {option} are unknown, as the log of the run said")
        size = products.diagonal().clamp(min=0).sqrt()
        size = torch.where(size > 0, size, torch.nan)
        found[name] = (products / size / size[:, None]).clamp(-1, 1)
    return found


def _products(layer: LayerStatistics, of: str) -> Tensor | None:
    """[E,E] scalar products of what is compared; their scale per expert does not matter."""
    if RECORDED[of] == "outputs":
        rows = layer.gated_output_sum if of == "gated_outputs" else layer.output_sum
        if rows is None and not layer.tokens:
            rows = torch.zeros(layer.num_experts, 1, dtype=torch.float64)
        return None if rows is None else _of_rows(rows)
    products, total = layer.logit_products, layer.logit_sum
    if products is None or total is None or of == "logits":
        return products
    return products - torch.outer(total, total) / max(1, layer.tokens)


def _of_rows(rows: Tensor) -> Tensor:
    """Scaled first, since sums may be as large as squares are not."""
    rows = rows / rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    return rows @ rows.T
