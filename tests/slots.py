"""What a layer's update takes, of many magnitudes, for the tests of the statistics."""

import torch

from reap.model.info import LayerInfo, ModelInfo

E, K = 6, 3
NAME = "model.layers.1.mlp.experts"
MODEL = ModelInfo("qwen3_moe", "tiny", "f" * 64, None, (LayerInfo(NAME, E, K),))
TWO_LAYERS = ModelInfo(
    "qwen3_moe", "tiny", "f" * 64, None, (LayerInfo("first", E, K), LayerInfo("second", 9, 2))
)


def slots(tokens: int, seed: int = 0, experts: int = E, k: int = K):
    """ids [T,K] distinct per token, weights, norms, peaks [T,K] fp32 of many magnitudes."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=g).topk(k, dim=1).indices
    weights = torch.rand(tokens, k, generator=g)
    norms = torch.randn(tokens, k, generator=g).mul(9).exp()
    return ids, weights, norms, norms * torch.rand(tokens, k, generator=g)
