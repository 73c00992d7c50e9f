"""What a run will take, judged by a few of its layers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from commandline import MODEL, invoke, refused, run_json
from folders import saved
from mtps import saved_with_mtp
from tiny import tiny_inputs, tiny_model

from reap.model.identity import describe_folder
from reap.model.load import load_mtp
from reap.runs import memory
from reap.runs.disk import statistics_size
from reap.runs.estimate import estimate
from reap.runs.waves import open_layers
from reap.text.batching import Batch


def batch(model: Any, seed: int = 0) -> Batch:
    return Batch(**tiny_inputs(model, lengths=[9, 9], seed=seed), domain="default")


def judged(folder: Path, model_type: str, tokens: int | None, **options: Any) -> Any:
    model = saved(folder, model_type, **options.pop("overrides", {}))
    limit = memory.resident() + (1 << 30)
    return estimate(
        open_layers(folder, limit=limit),
        [batch(model), batch(model, 1)][: options.pop("batches", 2)],
        tokens,
        whole=memory.resident() + 5_000_000,
        limit=limit,
        scratch=folder,
        **{"layerwise": False} | options,
    )


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "nemotron_h", "gemma4"])
@pytest.mark.parametrize("batches", [1, 2])
def test_any_architecture(tmp_path: Path, model_type: str, batches: int) -> None:
    found = judged(tmp_path, model_type, 1_000_000, batches=batches)
    assert found.bytes_read == found.stored > 0
    assert found.seconds > 1_000_000 / found.tokens_per_second > 0
    assert found.memory > 5_000_000 and found.mapped == found.stored
    assert " layers of " in found.about


def test_by_hand(tmp_path: Path) -> None:
    """A token meets the attention and the router, and of the experts as many as it gets."""
    found = judged(tmp_path, "qwen3_moe", 1000, pairs=True, domains=3)
    model = tiny_model("qwen3_moe")
    met = 0
    for name, weight in model.model.layers.named_parameters():
        if weight.dim() > 1:
            met += weight.numel() * (2 / 8 if ".experts." in name else 1)
    assert found.flops == 2 * 1000 * met
    assert found.stored == sum(w.nbytes for w in model.model.layers.parameters())
    assert found.statistics == statistics_size(describe_folder(tmp_path), True, 3)


def test_multi_token_prediction(tmp_path: Path) -> None:
    """A layer more: what it holds, what a token meets there, and its statistics."""
    saved_with_mtp(tmp_path, "deepseek_v3")
    model, found = tiny_model("deepseek_v3"), dict[bool, Any]()
    for with_mtp in (False, True):
        layers = open_layers(tmp_path)
        found[with_mtp] = estimate(
            layers,
            [batch(model), batch(model, 1)],
            1000,
            layerwise=True,
            whole=0,
            limit=memory.resident() + (1 << 30),
            scratch=tmp_path,
            mtp=load_mtp(layers.model, tmp_path) if with_mtp else None,
        )
    met = size = 0
    for name, weight in model.model.layers[-1].named_parameters():  # which that is a copy of
        share = 2 / 8 if ".mlp.experts." in f".{name}" else 1
        met += weight.numel() * share if weight.dim() > 1 else 0
        size += weight.nbytes
    hidden = 32
    met += 2 * hidden * hidden  # and its projection
    size += 4 * (2 * hidden * hidden + 2 * hidden + hidden)
    assert found[True].flops - found[False].flops == 2 * 1000 * met
    assert found[True].stored - found[False].stored == size
    assert found[True].statistics == found[False].statistics / 3 * 4


def test_one_layer(tmp_path: Path) -> None:
    found = judged(tmp_path, "qwen3_moe", 1000, overrides={"num_hidden_layers": 1})
    assert found.seconds > 0 and "1 layers of" in found.about


def test_waves(tmp_path: Path) -> None:
    """Layers are read once per wave."""
    found = judged(tmp_path, "qwen3_moe", 1000, layerwise=True, wave_tokens=100)
    assert found.bytes_read == 10 * found.stored and not found.mapped
    assert "at most 100 tokens at a time" in found.about


def test_text_of_unknown_length(tmp_path: Path) -> None:
    found = judged(tmp_path, "qwen3_moe", None)
    assert found.seconds is found.flops is found.bytes_read is None
    assert found.tokens_per_second > 0 and found.memory > 0


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("def f(x):\n    return x + 1\n" * 400)
    command = ["estimate", MODEL, "--data", tmp_path / "a.txt", "--seq-len", 64]
    found = run_json(*command)
    assert found["mode"] == "in memory" and found["seconds"] > 0 and found["tokens"] > 64
    code, shown, err = invoke(*command, "--stream", "--max-tokens", 640)
    assert (
        code == 0
        and "never called" not in err
        and "layer by layer (as asked for)" in shown
        and "640" in shown
    )
    assert [*tmp_path.iterdir()] == [tmp_path / "a.txt"]
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt" in refused("estimate", MODEL, "--data", tmp_path / "empty.txt")
    assert "do not hold one layer" in refused(*command, "--memory-limit", "1M")
    monkeypatch.setattr("reap.runs.memory.allowed", lambda: 1 << 20)
    assert "leave out --no-stream" in refused(*command, "--no-stream")
    calibrate = ["calibrate", *command[1:], "--out", tmp_path / "x.st"]
    assert "leave out --no-stream" in refused(*calibrate, "--no-stream")


def test_a_run_says_first_which_way_it_goes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("def f(x):\n    return x + 1\n" * 100)
    command = ["calibrate", MODEL, "--data", tmp_path / "a.txt", "--seq-len", 64]
    for options, way in ([], r"in memory \(\S+ [kMG]B of \S+ GB\)"), (["--stream"], "layer by"):
        code, _, err = invoke(*command, *options, "--out", tmp_path / "x.st", "--overwrite")
        assert code == 0 and re.search(way, err.splitlines()[0]), err
