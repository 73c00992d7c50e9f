"""Statistics of models that there are not, of any size, with domains that prefer other experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from reap.model.info import LayerInfo, ModelInfo
from reap.statistics.stats import Statistics

HOSTILE = "<script>alert(1)</script>\"'&$\\frac{x}$\u202e\n\x00" + "y" * 300


def madeup(
    layers: int = 4,
    experts: int = 8,
    top_k: int = 2,
    *,
    tokens: int = 300,
    domains: Sequence[str] = ("code", "prose"),
    name: str = "made up",
    layer_names: Sequence[str] = (),
    seed: int = 0,
    **kind: Any,
) -> Statistics:
    """`tokens` of each domain through every layer. `kind`: `pairs` and so on."""
    draw = torch.Generator().manual_seed(seed)
    names = list(layer_names) or [f"model.layers.{3 + i}.mlp.experts" for i in range(layers)]
    model = ModelInfo(
        "made_up", name, "f" * 64, None, tuple(LayerInfo(n, experts, top_k) for n in names)
    )
    stats = Statistics(model, versions={"torch": "2"}, **{"data": [text(domains, tokens)], **kind})
    for layer in names:
        liked = torch.randn(experts, generator=draw)
        size = torch.exp(torch.randn(experts, generator=draw) * 0.5)
        for domain in domains:
            weight = torch.softmax(liked + torch.randn(experts, generator=draw), 0)
            index = torch.multinomial(weight.expand(tokens, experts), top_k, generator=draw)
            gates = torch.rand(tokens, top_k, generator=draw) + 0.1
            noise = 0.7 + 0.6 * torch.rand(tokens, top_k, generator=draw)
            norms = size[index] * noise
            with stats.domain(domain):
                stats.update(layer, index, gates / gates.sum(1, keepdim=True), norms, norms / 3)
    return stats


def text(domains: Sequence[str], tokens: int) -> dict[str, Any]:
    """An entry of `data` as a calibration writes it."""
    sources = [
        {"spec": f"{domain}.jsonl", "domain": domain, "tokens": tokens, "counted": tokens}
        | {"rows": 3, "cut": 0, "bad": 0, "empty": 0, "weight": 1.0, "sha256": "ab" * 32}
        for domain in domains
    ]
    return {"tokens": tokens * len(domains), "seq_len": 64, "count": None, "sources": sources}
