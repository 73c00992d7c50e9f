"""`reap score`: the ends of every layer, or all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commandline import invoke, run_json

from reap.app.commands.scores import _ends
from reap.model.info import LayerInfo, ModelInfo
from reap.statistics.stats import Statistics


def test_every_expert_of_every_layer(work: Path) -> None:
    printed = run_json("score", work / "one.st", "--criterion", "frequency")
    assert printed["tokens"] == 512
    for layer in printed["layers"].values():
        assert layer["scores"] == layer["counts"]
    lines = invoke("score", work / "one.st", "--criterion", "frequency", "--all")[1].splitlines()
    assert "layer: model.layers.N.mlp.experts" in lines[0]
    rows = [line.split() for line in lines if line.strip()[:1].isdigit()]
    assert len(rows) == len(printed["layers"]) * 16
    for layer, expert, score, *_, tokens in rows:
        values = printed["layers"][f"model.layers.{layer}.mlp.experts"]
        assert float(score) == values["scores"][int(expert)] == int(tokens.replace(",", ""))
    first = [float(score) for layer, _, score, *_ in rows if layer == "0"]
    assert first == sorted(first)


def large(experts: int, layers: int, scale: float) -> Statistics:
    """Norms of about `scale`, tokens that see some of the experts."""
    names = [f"model.layers.{number}.mlp.experts" for number in range(60 - layers, 60)]
    model = ModelInfo("m", "t", "f", None, tuple(LayerInfo(n, experts, 8) for n in names))
    stats = Statistics(model, data=[], versions={})
    index = torch.arange(4 * experts).reshape(-1, 8) % experts
    with stats.domain("code"):
        for number, name in enumerate(names):
            norms = scale * (1 + torch.arange(index.numel()).reshape(index.shape) % (7 + number))
            stats.update(name, index, torch.full(index.shape, 0.123), norms, norms)
    return stats


@pytest.mark.parametrize("scale", [1e-7, 1.2345e-3, 1.0, 54321.0, 1e9])
@pytest.mark.parametrize("experts", [8, 384])
def test_eighty_columns(tmp_path: Path, experts: int, scale: float) -> None:
    layers = 2
    large(experts, layers, scale).save(tmp_path / "s.st")
    for criterion in ("reap", "frequency"):
        for more in ([], ["--all"]):
            code, out, err = invoke("score", tmp_path / "s.st", "--criterion", criterion, *more)
            assert code == 0, err
            lines = out.splitlines()
            assert max(len(line.rstrip()) for line in lines) <= 80, out
            rows = [line for line in lines if line.strip()[:1].isdigit()]
            assert len(rows) == (layers * experts if more else layers)


def test_experts_with_few_tokens_are_named(tmp_path: Path) -> None:
    names = [f"model.layers.{number}.mlp.experts" for number in range(2)]
    layers = tuple(LayerInfo(name, 4, 1) for name in names)
    stats = Statistics(ModelInfo("m", "t", "f", None, layers), data=[], versions={})
    with stats.domain("code"):
        for name, counts in zip(names, ([100, 100, 99, 200], [150, 150, 100, 100]), strict=True):
            index = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))[:, None]
            ones = torch.ones(index.shape)
            stats.update(name, index, ones, ones, ones)
    stats.save(tmp_path / "s.st")
    lines = invoke("score", tmp_path / "s.st")[1].splitlines()
    assert lines[-2].startswith("fewer than 100 tokens") and lines[-1] == "layer 0: 2"


def test_two_experts_have_a_score_in_every_column() -> None:
    assert _ends(torch.tensor([2.0, 1.0])) == ["1: 1", "0: 2", "0: 2", "0: 2", "0: 2"]
