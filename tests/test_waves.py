"""Waves: as many tokens as there is room for, kept when they are whole, and the same bits."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import saved, tensors_of
from letters import Tokenizer
from processes import killed, one_thread  # noqa: F401
from safetensors.torch import save_file
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

from bench.prune import write_checkpoint
from reap.errors import ReapError
from reap.model.load import load_model
from reap.runs import memory
from reap.runs.calibration import calibrate
from reap.runs.partial import Partial
from reap.runs.room import Room
from reap.runs.waves import calibrate_streamed
from reap.statistics.stats import Statistics
from reap.text.batching import Batches, batches

BATCH = 2 * 16  # tokens


class Stop(Exception):
    pass


@pytest.fixture
def here(tmp_path: Path) -> Path:
    saved(tmp_path / "model", shards=True)
    words = [f"row {number} of several" for number in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in words))
    (tmp_path / "b.txt").write_text("other text of another kind; " * 20)
    return tmp_path


def text(here: Path, **options: Any) -> Batches:
    specs = [str(here / "a.jsonl"), str(here / "b.txt")]
    return batches(specs, Tokenizer(), **{"seq_len": 16, "batch_size": 2} | options)


def whole(here: Path, **options: Any) -> Statistics:
    return calibrate(load_model(here / "model", device="cpu"), text(here, **options))


def streamed(here: Path, **options: Any) -> Statistics:
    rows = options.pop("rows", None) or text(here)
    partial = Partial(here / "kept")
    with partial.kept():
        return calibrate_streamed(here / "model", rows, partial=partial, scratch=here, **options)


def loads(monkeypatch: Any) -> list[str]:
    """The names of the layers that are loaded, as they come."""
    from reap.model.layerwise import Layerwise

    seen: list[str] = []
    original = Layerwise._load

    def load(self: Any, unit: Any, tensors: Any) -> None:
        seen.append(unit.name)
        original(self, unit, tensors)

    monkeypatch.setattr(Layerwise, "_load", load)
    return seen


@pytest.mark.parametrize(("most", "packing"), [(None, True), (100, True), (10, True), (100, False)])
def test_the_same_in_any_number_of_waves(
    here: Path, monkeypatch: Any, most: int | None, packing: bool
) -> None:
    sizes = [batch.input_ids.numel() for batch in text(here, packing=packing)]
    seen = loads(monkeypatch)
    found = streamed(here, rows=text(here, packing=packing), wave_tokens=most)
    plain = whole(here, packing=packing)
    assert found.digest() == plain.digest() and found.data == plain.data
    if packing:
        waves = {None: 1, 100: math.ceil(len(sizes) / 3), 10: len(sizes)}[most]
        # And the first layer once more, where others follow the batch that shows what it needs.
        assert len(seen) == 4 * waves + (most != 10)
    assert not (here / "kept").exists()


def test_hidden_states_in_a_file(here: Path, monkeypatch: Any) -> None:
    """Where memory has room for two batches and half of what the others hold."""
    size = 32 * 4.0
    room = Room(limit=1000 * BATCH, fixed=0, held=1.5 * size, hidden=size)
    said: list[str] = []
    monkeypatch.setattr("reap.runs.waves.measure", lambda *_: room)
    monkeypatch.setattr("reap.runs.room.Room.in_memory", lambda _: 2 * BATCH)
    monkeypatch.setattr("reap.runs.room.Room.with_file", lambda *_: 12 * BATCH)
    monkeypatch.setattr("reap.runs.room.Room.in_file", lambda *_: 10 * BATCH)
    away: list[int] = []
    from reap.runs.hidden import Place

    original = Place.holds

    def holds(self: Any, tensor: torch.Tensor) -> Any:
        away.append(tensor.nbytes)
        return original(self, tensor)

    monkeypatch.setattr(Place, "holds", holds)
    found = streamed(here, say=said.append)
    assert found.digest() == whole(here).digest()
    assert "kB, at most 384 tokens at a time, 45.06 kB of hidden states in a file" in said[0]
    assert set(away) <= {2048, int(BATCH * size)} and len(away) >= 4 * 20
    assert sorted(path.name for path in here.iterdir()) == ["a.jsonl", "b.txt", "model"]


def stops(monkeypatch: Any, error: BaseException, calls: int) -> None:
    count = iter(range(1_000_000))
    original = Qwen3MoeDecoderLayer.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(count) == calls:
            raise error
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Qwen3MoeDecoderLayer, "forward", forward)


@pytest.mark.parametrize("calls", [5, 40, pytest.param(75, marks=pytest.mark.slow)])
def test_a_run_goes_on_behind_its_last_wave(here: Path, monkeypatch: Any, calls: int) -> None:
    """Of waves of three batches, four layers each. A run in memory goes on as well."""
    with monkeypatch.context() as patch:
        stops(patch, Stop("late"), calls)
        with pytest.raises(Stop):
            streamed(here, wave_tokens=3 * BATCH)
    done = calls // 12 * 3
    assert (here / "kept").exists() == (done > 0)
    if done:
        kept = Statistics.load(here / "kept")
        assert kept.data[0]["partial"] == {"batches": done}
    shutil.copytree(here, here / "copy", ignore=lambda *_: ["copy", "model"])
    progress: list[int] = []
    found = streamed(here, wave_tokens=5 * BATCH, progress=progress.append)
    plain = whole(here)
    assert found.digest() == plain.digest() and found.data == plain.data
    assert sum(progress) == found.tokens
    if done:
        shutil.copy(here / "copy/kept", here / "kept")
        partial = Partial(here / "kept")
        model = load_model(here / "model", device="cpu")
        assert calibrate(model, text(here), partial=partial).digest() == found.digest()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kills", [3, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_any_moment(here: Path, kills: int) -> None:
    """kill -9, again and again: the run that gets through has the bits of one without breaks."""
    expected = whole(here)
    left = killed(here, lambda: streamed(here, wave_tokens=3 * BATCH), expected, kills)
    print(f"{kills} kills, by batches kept: {sorted(left.items())}")
    assert kills < 100 or len(left) > 3, "kills in several waves"
    assert {path.name for path in here.iterdir()} == {"a.jsonl", "b.txt", "done", "model"}


def test_it_goes_on_with_what_a_run_in_memory_left(here: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("reap.runs.partial._SHARE", math.inf)
    partial, model = Partial(here / "kept"), load_model(here / "model", device="cpu")
    with monkeypatch.context() as patch, pytest.raises(Stop), partial.kept():
        stops(patch, Stop("late"), 4 * 7 + 2)
        calibrate(model, text(here), partial=partial)
    assert Statistics.load(here / "kept").data[0]["partial"] == {"batches": 7}
    found = streamed(here, wave_tokens=5 * BATCH)
    assert found.digest() == whole(here).digest() and found.data == whole(here).data


@pytest.mark.parametrize("change", ["gone", "shorter", "written"])
def test_a_shard_that_changes(here: Path, monkeypatch: Any, change: str) -> None:
    """One line, and what was measured before is kept."""
    original = Partial.keep

    def keep(self: Any, *args: Any) -> None:
        original(self, *args)
        for shard in (here / "model").glob("*.safetensors"):
            if change == "gone":
                shard.unlink()
            elif change == "shorter":
                os.truncate(shard, 1000)
            else:
                os.utime(shard, ns=(1, 1))

    monkeypatch.setattr(Partial, "keep", keep)
    with pytest.raises(
        ReapError, match=r"cannot read .*safetensors|changed while it was"
    ) as caught:
        streamed(here, wave_tokens=3 * BATCH)
    assert "\n" not in str(caught.value)
    (note,) = caught.value.__notes__  # type: ignore[attr-defined]
    assert "so far, 96 tokens" in note


def test_limits_that_hold_nothing(here: Path, monkeypatch: Any) -> None:
    with pytest.raises(
        ReapError, match=r"do not hold one layer: model.layers.0 takes .* are needed"
    ):
        streamed(here, memory_limit=memory.resident())
    room = Room(limit=1000, fixed=0, held=100.0, hidden=50.0)
    monkeypatch.setattr("reap.runs.waves.measure", lambda *_: room)
    with pytest.raises(
        ReapError, match=r"a batch of 32 tokens: that takes 3.37 kB \(--memory-limit"
    ):
        streamed(here)


def test_a_configuration_that_asks_for_every_layer(here: Path, monkeypatch: Any) -> None:
    """What a forward returns of all layers would be held for all batches."""
    config = json.loads((here / "model/config.json").read_text())
    config |= {"output_hidden_states": True, "output_router_logits": True}
    (here / "model/config.json").write_text(json.dumps(config))
    returned: list[Any] = []
    from reap.runs import calibration

    original: Callable[..., Any] = calibration.forward_of

    def forward_of(model: Any) -> Any:
        model.base_model.register_forward_hook(lambda *args: returned.append(args[-1]))
        return original(model)

    monkeypatch.setattr("reap.runs.waves.forward_of", forward_of)
    assert streamed(here).digest() == whole(here).digest()
    assert not any(out.hidden_states or out.get("router_logits") for out in returned)


def test_batches_of_any_loader(here: Path) -> None:
    loader = [
        {"input_ids": torch.arange(10).view(2, 5) + 20},
        {"input_ids": torch.ones(1, 3).long()},
    ]
    found = calibrate_streamed(here / "model", loader)
    assert found == calibrate(load_model(here / "model", device="cpu"), loader)
    with pytest.raises(ReapError, match="only with batches of reap.batches"):
        calibrate_streamed(here / "model", loader, partial=Partial(here / "kept"))
    with pytest.raises(ReapError, match="has no tokens"):
        calibrate_streamed(here / "model", [])


def test_weights_that_are_not_numbers_are_named(here: Path) -> None:
    tensors = tensors_of(here / "model")
    for path in (here / "model").glob("model*"):
        path.unlink()
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    tensors[name] = torch.full_like(tensors[name], float("inf"))
    save_file(tensors, here / "model/model.safetensors", {"format": "pt"})
    with pytest.raises(ReapError, match=r"layers\.1\..*expert 3"):
        streamed(here)


def test_arguments_that_are_refused(here: Path) -> None:
    with pytest.raises(ReapError, match="'much' is not a size"):
        streamed(here, memory_limit="much")
    with pytest.raises(ReapError, match="wave_tokens is 0: it has to be at least 1"):
        streamed(here, wave_tokens=0)


_CHILD = """
import sys, torch, reap
from transformers import Qwen3MoeForCausalLM
from reap.runs import memory
torch.set_num_threads(1)
limit = memory.resident() + 320_000_000
peaks, reset = [], memory.reset_peak

def reset_peak():
    peaks.append(memory.peak())
    reset()

reset_peak()
memory.reset_peak = reset_peak
rows = [{"input_ids": torch.full((1, 16), i)} for i in range(8)]
stats = reap.calibrate_streamed(sys.argv[1], rows, memory_limit=limit)
reset_peak()
print(max(peaks[1:]), limit, stats.tokens)
"""


def test_a_limit_is_kept(tmp_path: Path) -> None:
    """Of a model of 450 MB, by a process that may have 320 MB more than it has without it."""
    noise = (torch.randn(1 << 20) * 0.03).bfloat16().view(torch.uint8).numpy().tobytes()
    write_checkpoint(tmp_path / "model", 6, 2048, 768, 8, noise)
    command = [sys.executable, "-c", _CHILD, str(tmp_path / "model")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, limit, tokens = map(int, done.stdout.split())
    assert limit - 200_000_000 < peak <= limit and tokens == 128
