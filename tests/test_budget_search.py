"""The budget search of the examples keeps its budget and never gets worse."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from tiny import VOCAB, tiny_model

import reap

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "examples"))

from budget_search import moves, order_of, search  # noqa: E402


def test_the_search_keeps_its_budget_and_never_gets_worse() -> None:
    model = tiny_model("qwen3_moe")
    ids = torch.randint(VOCAB, (4, 12), generator=torch.Generator().manual_seed(0))
    rows = [reap.Batch(ids, torch.ones_like(ids), "d")]
    with torch.no_grad(), reap.observe(model) as stats:
        model(input_ids=ids)
    plan, found = search(model, rows, stats, total=18, rounds=5, tries=6)
    assert sum(map(len, plan.kept.values())) == 18
    assert found == sorted(found, reverse=True) and found[-1] < found[0]
    result = reap.evaluate(model, rows, plans={"best": plan})["best"]["total"]
    assert result.kl == pytest.approx(found[-1])
    again = search(model, rows, stats, total=18, rounds=5, tries=6)
    assert again[0].kept == plan.kept and again[1] == found


def test_moves_keep_the_sum() -> None:
    found = list(moves([2, 4, 3], [4, 4, 4], 2, random.Random(0)))
    assert sorted(found) == [[4, 2, 3], [4, 4, 1]]  # a layer keeps some, and no more than it has
    assert all(sum(new) == 9 for new in moves([2, 4, 3], [4, 4, 4], 1, random.Random(0)))


def test_groups_stay_level() -> None:
    layer = reap.LayerInfo("a", 6, 2, n_group=2, topk_group=2)
    assert order_of(layer, [5.0, 3.0, 4.0, 0.0, 1.0, 6.0]) == [0, 5, 2, 4, 1, 3]
