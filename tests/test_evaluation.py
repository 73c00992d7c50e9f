import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import some_plan
from letters import Tokenizer
from tiny import VOCAB, tiny_model

from reap.errors import ReapError
from reap.model.identity import describe
from reap.planning.plan import Plan
from reap.runs.evaluation import evaluate
from reap.runs.generation import generate_texts
from reap.runs.masking import masked
from reap.text.batching import Batch, batches


def batch(domain, *rows, length=None):
    """Right-padded rows; the padding is a token that the model would notice."""
    length = length or max(map(len, rows))
    ids = torch.full((len(rows), length), 7)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    return Batch(ids, mask, domain)


def rows(seed, *lengths):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]


def by_hand(model, some_rows, teacher=None):
    """(tokens, loss, KL, agreement): row by row, token by token, fp64, no padding anywhere."""
    loss = divergence = 0.0
    same = tokens = 0
    for row in some_rows:
        ids = torch.tensor([row])
        with torch.no_grad():
            mine = model(input_ids=ids).logits[0].double()
            theirs = teacher(input_ids=ids).logits[0].double() if teacher else mine
        for position in range(len(row) - 1):
            q, p = mine[position].softmax(0), theirs[position].softmax(0)
            loss -= q[row[position + 1]].log().item()
            divergence += (p * (p / q).log()).sum().item()
            same += int(mine[position].argmax() == theirs[position].argmax())
            tokens += 1
    return tokens, loss / tokens, divergence / tokens, same / tokens


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3_moe")


@pytest.fixture(scope="module")
def teacher(model):
    other = tiny_model("qwen3_moe")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    return other


@pytest.mark.parametrize("chunk", [1, 5 * VOCAB, 1 << 24], ids=["one token", "five", "all"])
def test_matches_a_computation_by_hand(model, teacher, monkeypatch, chunk):
    monkeypatch.setattr("reap.runs.evaluation._CHUNK", chunk)
    code, prose = rows(0, 9, 5, 2, 7), rows(1, 6, 1)
    seen: list[int] = []
    results = evaluate(
        model,
        [batch("code", *code[:3]), batch("prose", *prose), batch("code", code[3])],
        teacher=teacher,
        progress=seen.append,
    )
    assert list(results) == ["code", "prose", "total"] and seen == [16, 7, 7]
    for name, expected_rows in (("code", code), ("prose", prose), ("total", code + prose)):
        tokens, loss, kl, agreement = by_hand(model, expected_rows, teacher)
        result = results[name]
        assert (result.tokens, result.agreement) == (tokens, agreement)
        assert result.loss == pytest.approx(loss, rel=1e-5)
        assert result.kl == pytest.approx(kl, rel=1e-4) and kl > 1e-3
        assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_only_what_counts_is_predicted(model):
    """The rest is context: the halves of a row make up the whole."""
    whole = batch("d", *rows(2, 8, 5))
    counted = torch.zeros_like(whole.input_ids)
    counted[0, 3:] = counted[1, 0] = 1  # the first token of a row is never predicted
    halves = [
        evaluate(model, [replace(whole, counted=tokens)])["total"]
        for tokens in (counted, 1 - counted)
    ]
    result = evaluate(model, [whole])["total"]
    assert [half.tokens for half in halves] == [5, 6] and result.tokens == 11
    loss = sum(half.tokens * half.loss for half in halves)
    assert loss == pytest.approx(11 * result.loss, rel=1e-6)


def test_a_model_agrees_with_itself(model):
    result = evaluate(model, [batch("d", *rows(2, 8, 4))], teacher=model)["total"]
    assert (result.kl, result.agreement) == (0, 1)


def test_without_a_teacher(model):
    result = evaluate(model, [batch("d", *rows(2, 8))])["d"]
    assert result.kl is None and result.agreement is None
    assert set(result.to_json()) == {"tokens", "loss", "perplexity"}


def test_padding_changes_nothing(model, teacher):
    some = rows(3, 8, 3)
    tight = [batch("d", row) for row in some]
    padded = [batch("d", *some, length=20)]
    one, other = (evaluate(model, data, teacher=teacher)["d"] for data in (tight, padded))
    assert one.tokens == other.tokens == 9
    assert other.loss == pytest.approx(one.loss, rel=1e-5)
    assert other.kl == pytest.approx(one.kl, rel=1e-4)


def test_left_padding_is_not_predicted(model):
    row = rows(4, 6)[0]
    left = Batch(torch.tensor([[7, 7, *row]]), torch.tensor([[0, 0] + [1] * 6]), "d")
    tokens, loss, *_ = by_hand(model, [row])
    result = evaluate(model, [left])["d"]
    assert result.tokens == tokens and result.loss == pytest.approx(loss, rel=1e-5)


def test_modes_are_restored(model, teacher):
    model.train()
    try:
        evaluate(model, [batch("d", *rows(2, 8))], teacher=teacher)
        assert model.training and not teacher.training
        with pytest.raises(ReapError):
            evaluate(model, [])
        assert model.training
    finally:
        model.eval()


@pytest.mark.parametrize("data", [[], [batch("d", [1]), batch("e", [2])]], ids=["none", "short"])
def test_nothing_to_predict(model, data):
    with pytest.raises(ReapError, match="nothing to evaluate"):
        evaluate(model, data)


def test_vocabularies_differ(model):
    other = tiny_model("qwen3_moe", vocab_size=VOCAB + 4)
    with pytest.raises(ReapError, match=f"predicts {VOCAB} tokens and the teacher {VOCAB + 4}"):
        evaluate(model, [batch("d", *rows(2, 8))], teacher=other)


def test_ids_from_another_tokenizer(model):
    with pytest.raises(ReapError, match=f"token id {VOCAB} in domain 'd'"):
        evaluate(model, [batch("d", [1, VOCAB, 2])])


def test_not_finite_is_an_error(model):
    broken = tiny_model("qwen3_moe")
    with torch.no_grad():
        broken.lm_head.weight[3, 0] = math.nan
    with pytest.raises(ReapError, match="domain 'd': the loss is not finite"):
        evaluate(broken, [batch("d", *rows(2, 8))])
    with pytest.raises(ReapError, match="domain 'd': the loss is not finite"):
        evaluate(model, [batch("d", *rows(2, 8))], teacher=broken)


def test_reserved_name(model):
    with pytest.raises(ReapError, match="'total'"):
        evaluate(model, [batch("total", *rows(2, 8))])


def test_tokens_that_the_teacher_rules_out(model):
    """Logits of -inf on both sides: 0 log 0 counts as 0, not as NaN."""

    class Masked(torch.nn.Module):
        device = torch.device("cpu")

        def get_input_embeddings(self):
            return model.get_input_embeddings()

        def forward(self, **inputs):
            out = model(**inputs)
            out.logits[..., 90:] = -math.inf
            return out

    data = batch("d", [row % 90 for row in rows(2, 8)[0]])
    result = evaluate(Masked(), [data], teacher=Masked())["d"]
    assert result.kl == 0 and math.isfinite(result.loss)


def plans_of(model: Any, *keeps: int) -> dict[str, Plan]:
    return {f"{keep}": some_plan(Path(), keep, model=describe(model)) for keep in keeps}


@pytest.mark.parametrize("chunk", [3 * VOCAB, 1 << 24], ids=["three tokens", "all"])
def test_plans_in_one_pass(model, teacher, monkeypatch, chunk):
    monkeypatch.setattr("reap.runs.evaluation._CHUNK", chunk)
    data = [batch("a", *rows(0, 9, 5)), batch("b", *rows(1, 7))]
    plans = plans_of(model, 8, 5, 2)
    seen: list[int] = []
    calls: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    results = evaluate(model, data, plans=plans, progress=seen.append)
    hook.remove()
    assert list(results) == ["8", "5", "2"] and seen == [14, 7]
    assert len(calls) == len(data) * (len(plans) + 1), "the teacher runs once"
    plain = evaluate(model, data)
    assert list(results["5"]) == ["a", "b", "total"]
    assert results["8"]["total"].kl == 0 and results["8"]["total"].agreement == 1
    strayed = [found["total"].kl or 0.0 for found in results.values()]
    assert 0 == strayed[0] < strayed[1] < strayed[2]
    for name, plan in plans.items():
        with masked(model, plan):
            alone = evaluate(model, data)
        for domain, result in results[name].items():
            assert result.teacher_loss == plain[domain].loss
            assert (result.tokens, result.loss) == (alone[domain].tokens, alone[domain].loss)
    other = evaluate(model, data, plans=plans, teacher=teacher)["8"]
    assert other == evaluate(model, data, teacher=teacher)
    assert evaluate(model, data) == plain, "no mask is left"


def test_plans_as_files_and_bad_ones(model, tmp_path):
    data = [batch("d", *rows(2, 8))]
    plan = plans_of(model, 5)["5"]
    plan.save(tmp_path / "plan.json")
    found = evaluate(model, data, plans={"file": tmp_path / "plan.json", "plan": plan})
    assert found["file"] == found["plan"]
    with pytest.raises(ReapError, match="plans names no plan"):
        evaluate(model, data, plans={})
    other = plans_of(tiny_model("mixtral"), 5)["5"]
    with pytest.raises(ReapError, match="plan b: the plan was made for another model than"):
        evaluate(model, data, plans={"a": plan, "b": other})
    broken = tiny_model("qwen3_moe")
    with torch.no_grad():
        broken.lm_head.weight[3, 0] = math.nan
    with pytest.raises(ReapError, match="plan a, domain 'd': the loss is not finite"):
        evaluate(broken, data, plans={"a": plan})


def test_the_name_of_the_sum_is_refused_before_anything_runs(model, tmp_path, monkeypatch):
    (tmp_path / "total.txt").write_text("some words " * 50)
    (tmp_path / "first.txt").write_text("other words " * 50)
    ran = []
    hook = model.register_forward_pre_hook(lambda *_: ran.append(1))
    text = batches([str(tmp_path / f"{name}.txt") for name in ("first", "total")], Tokenizer())
    try:
        for given in (text, [batch("total", *rows(0, 5))]):
            with pytest.raises(ReapError, match="domain 'total' is the name of the sum"):
                evaluate(model, given)
        with pytest.raises(ReapError, match="domain 'total' is the name of the sum"):
            generate_texts(model, {"total": torch.ones(1, 3, dtype=torch.int64)}, 3)
    finally:
        hook.remove()
    assert not ran
