"""How many tokens fit: the arithmetic, and what the first batch shows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from folders import saved
from slots import TWO_LAYERS

from reap.errors import ReapError
from reap.model.layerwise import Needs
from reap.runs import memory, room
from reap.runs.room import Room, admission
from reap.runs.waves import calibrate_streamed
from reap.statistics.stats import Statistics
from reap.text.batching import Batch


def of(free: int, *, held: float = 10.0, hidden: float = 8.0) -> Room:
    return Room(limit=1000, fixed=950 - free, held=held, hidden=hidden)


def test_without_a_file() -> None:
    assert of(500).in_memory() == 50
    of(500).check(50)
    with pytest.raises(ReapError, match=r"1.00 kB of memory .* batch of 51 tokens: .* 1.01 kB"):
        of(500).check(51)


@pytest.mark.parametrize(
    ("stored", "disk", "hidden", "tokens"),
    [
        (10_000, 1 << 40, 8.0, 250),  # of each, two bytes have to stay in memory
        (10_000, 500, 8.0, 75),  # the disk gives half of what it has
        (4_000, 1 << 40, 8.0, 50),  # reading the layers again costs less: 2 * 5 * 8 * 50
        (10_000, 1 << 40, 0.0, 50),  # nothing of what they hold can wait there
    ],
)
def test_with_a_file(monkeypatch: Any, stored: int, disk: int, hidden: float, tokens: int) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(free=disk))
    assert of(500, hidden=hidden).with_file(Path(), 5, stored) == tokens


def test_what_of_a_wave_waits_in_the_file() -> None:
    """So that all fit: 250 tokens hold 2,500 bytes, 2,000 of them too many."""
    assert of(500).in_file(250) == 250
    assert of(500).in_file(75) == 32
    assert of(500).in_file(50) == 0


def test_a_limit_that_does_not_hold_a_layer(monkeypatch: Any) -> None:
    monkeypatch.setattr(memory, "resident", lambda: 100)
    needs = Needs(stays=500, layer=300, name="layers.7")
    admission(948)(needs)
    with pytest.raises(
        ReapError, match=r"do not hold one layer: layers.7 takes 300 bytes .* 947 b"
    ):
        admission(946)(needs)


def test_statistics_that_grow_count_with_what_they_may_become() -> None:
    """Coalitions: with as many sets as may be, and the tokens that wait."""
    ids = torch.rand(5000, 9, generator=torch.Generator().manual_seed(0)).topk(2).indices
    more = Statistics(TWO_LAYERS, coalitions=30, logits=True)
    before = room._sums(more)
    for name in more.layers:
        count = more.model.layer(name).num_experts
        ones = torch.ones(len(ids), 2)
        more.update(name, ids % count, ones, ones, ones, logits=torch.ones(len(ids), count))
    held = sum(x.nbytes for name in more.layers for x in more[name].tensors().values())
    waiting = 2**16 * 4 * sum(layer.top_k for layer in TWO_LAYERS.layers)
    assert held + waiting <= before
    assert before - room._sums(Statistics(TWO_LAYERS, logits=True)) > waiting


def test_what_a_batch_holds(tmp_path: Path, monkeypatch: Any) -> None:
    """Of hidden states [B,L,H] in fp32, and the tables of positions; more with a mask."""
    saved(tmp_path, "qwen3_moe")
    found: list[Room] = []
    original = room.measure

    def measure(*args: Any) -> Room:
        found.append(original(*args))
        return found[-1]

    monkeypatch.setattr("reap.runs.waves.measure", measure)
    ids = torch.arange(64).view(2, 32) + 20
    calibrate_streamed(tmp_path, [Batch(ids, ids * 0 + 1, "a")])
    (one,) = found
    assert one.hidden == 32 * 4
    tables = 2 * 32 * 8 * 4  # cos and sin [1,L,head_dim]
    assert one.held * 64 - room.FRAMES == 64 * 32 * 4 + tables + 32 * 8
    assert memory.resident() * 0.5 < one.fixed < memory.resident() * 2
