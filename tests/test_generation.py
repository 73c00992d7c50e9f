"""Prompts of a text, what models write behind them, and the counts and intervals of that."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from tiny import VOCAB, tiny_model

from reap.errors import ReapError
from reap.runs.generation import (
    Generation,
    distinct,
    generate_texts,
    loops,
    prompts_of,
    wilson,
)
from reap.runs.masking import masked
from reap.text.batching import Batch


def test_wilson() -> None:
    """Of Newcombe (Statistics in Medicine 17, 1998), table I, method 3."""
    for successes, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = wilson(successes, trials)
        assert found.share == successes / trials
        assert found.low == pytest.approx(low, abs=5e-5)
        assert found.high == pytest.approx(high, abs=5e-5)
    assert wilson(20, 20).high == 1.0 and wilson(0, 7).low == 0.0


def test_loops() -> None:
    text = list(range(100, 140))
    assert not loops(text) and not loops([])
    assert loops([*text, *[7] * 24]) and not loops([*text, *[7] * 23])
    assert loops([*text, *[1, 2, 3] * 8]) and not loops([*text, *[1, 2, 3] * 7])
    cycle = list(range(30))
    assert loops(cycle * 4) and not loops(cycle * 3)
    assert not loops([*cycle * 4, 99])  # it has got out
    assert not loops(list(range(33)) * 4)  # longer than a period may be


def test_distinct() -> None:
    assert distinct([[1, 2, 1, 2]], 2) == 2 / 3
    assert distinct([[1, 2, 3], [1, 2, 4]], 2) == 3 / 4  # not across texts, and over all of them
    assert math.isnan(distinct([[1]], 2))


def test_counts_of_texts() -> None:
    made = Generation.of([([7] * 30, False), ([1, 2, 3, 4, 5], True), ([], True)])
    assert (made.texts, made.tokens, made.looped, made.ended, made.at_limit) == (3, 35, 1, 2, 1)
    assert made.distinct == 3 / 29
    told = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert told["looped_share"] == wilson(1, 3)._asdict()
    assert told["ended_share"]["share"] == pytest.approx(2 / 3)
    assert Generation.of([([], True)]).to_json()["distinct"] is None


def batch(domain: str, lengths: list[int], start: int = 0) -> Batch:
    """Row i counts from `start` + 100 i."""
    size = max(lengths)
    ids = torch.arange(size)[None] + 100 * torch.arange(len(lengths))[:, None] + start
    mask = (torch.arange(size)[None] < torch.tensor(lengths)[:, None]).long()
    return Batch(ids * mask, mask, domain)


def test_prompts_are_spread_over_domains_and_rows() -> None:
    data = [batch("a", [8] * 6), batch("b", [8, 3, 4]), batch("a", [8] * 6, 600)]
    found = prompts_of(data, 6, 3)
    assert found["a"][:, 0].tolist() == [0, 300, 600, 900]  # of twelve rows
    assert found["b"].tolist() == [[0, 1, 2], [200, 201, 202]], "one row has but the prompt"
    assert prompts_of(data, 3, 3)["a"].shape == (2, 3)
    assert list(prompts_of(data, 1, 3)) == ["a"]
    assert sum(map(len, prompts_of(data, 100, 3).values())) == 14
    assert list(prompts_of(data, 4, 7)) == ["a", "b"] and len(prompts_of(data, 4, 7)["b"]) == 1
    with pytest.raises(ReapError, match="no row of the text is longer than prompt_tokens=8: take"):
        prompts_of(data, 4, 8)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen3_moe")


@pytest.fixture(scope="module")
def prompts() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randint(2, VOCAB, (3, 5), generator=generator) for name in ("a", "b")}


def by_hand(model: Any, prompts: torch.Tensor, steps: int, *ends: int) -> list[Any]:
    """Token by token, without a cache."""
    texts = []
    for row in prompts:
        new: list[int] = []
        while len(new) < steps and not {*new} & {*ends}:
            ids = torch.tensor([row.tolist() + new])
            with torch.no_grad():
                new.append(int(model(input_ids=ids).logits[0, -1].argmax()))
        texts.append((new[:-1], True) if new[-1] in ends else (new, False))
    return texts


def test_greedy_text_ends_where_the_model_does(model: Any, prompts: Any) -> None:
    """Whatever else the model's own settings say of generation."""
    free = by_hand(model, prompts["a"], 6)
    ends = [free[0][0][2], VOCAB - 1]  # so that the first text is two tokens long, or shorter
    own = model.generation_config
    own.eos_token_id, own.repetition_penalty, own.max_new_tokens = ends, 5.0, 1
    try:
        heard: list[int] = []
        made = generate_texts(model, prompts, 6, at_once=2, progress=heard.append)
        assert model.generation_config is own
    finally:
        own.eos_token_id, own.repetition_penalty, own.max_new_tokens = None, None, None
    texts = {name: by_hand(model, rows, 6, *ends) for name, rows in prompts.items()}
    assert made["a"] == Generation.of(texts["a"]) and made["a"].ended >= 1
    assert made["total"] == Generation.of(texts["a"] + texts["b"])
    assert heard == [12, 6] * 2


def test_texts_are_drawn_from_a_seed(model: Any, prompts: Any) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (
        generate_texts(model, prompts, 12, temperature=3.0, seed=seed)["total"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.rand(1), expected), "what others draw stays as it was"
    assert first == again
    assert other.texts == 6
    assert first.distinct > generate_texts(model, prompts, 12)["total"].distinct


def test_a_mask_changes_the_text(model: Any, prompts: Any) -> None:
    from test_evaluation import plans_of

    plain = generate_texts(model, prompts, 16)
    plans = plans_of(model, 8, 2)
    with masked(model, plans["8"]):
        assert generate_texts(model, prompts, 16) == plain
    with masked(model, plans["2"]):
        assert generate_texts(model, prompts, 16) != plain


def test_bad_input(model: Any, prompts: Any) -> None:
    most = model.config.max_position_embeddings
    cases: list[tuple[str, Any, int, dict[str, Any]]] = [
        (f"are more than the {most} tokens that the model reads", prompts, most, {}),
        ("new_tokens is 0", prompts, 0, {}),
        ("temperature is 0.0", prompts, 4, {"temperature": 0.0}),
        ("no prompts", {}, 4, {}),
        ("'total' is the name", {"total": prompts["a"]}, 4, {}),
        (f"token id {VOCAB}", {"a": torch.full((1, 3), VOCAB)}, 4, {}),
        ("at_once is 0", prompts, 4, {"at_once": 0}),
    ]
    for error, given, new, more in cases:
        with pytest.raises(ReapError, match=error):
            generate_texts(model, given, new, **more)
    with pytest.raises(ReapError, match="a Linear: it must be a language model"):
        generate_texts(torch.nn.Linear(2, 2), prompts, 4)
