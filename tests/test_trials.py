"""What is tried of every model of an evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_evaluation import plans_of
from tiny import VOCAB, tiny_model

from reap.app.trials import Found, GenerateOptions, TaskOptions, Trials
from reap.runs.generation import generate_texts
from reap.runs.masking import masked
from reap.runs.tasks import Tasks


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen3_moe")


class Counting(Tasks):
    """Answers with how many experts the model's routers choose among, without the harness."""

    def __init__(self) -> None:
        self.asked = 0

    def run(self, model: Any, tokenizer: Any, *, batch_size: int = 1) -> Any:
        self.asked += 1
        ids = torch.tensor([[5, 6, 7]])
        logits = model.model(input_ids=ids, output_router_logits=True).router_logits
        return {"count": {"experts,none": logits[0].shape[-1]}}


def test_plans_are_compared_with_the_whole_model(model: Any) -> None:
    plans = plans_of(model, 5, 2)
    trials = Trials(model, plans, None)
    assert trials.reference is model and list(trials.variants) == ["5", "2"]
    prompts = {"d": torch.randint(VOCAB, (2, 4), generator=torch.Generator().manual_seed(1))}
    found: Found = {"5": {"d": {"loss": 1.0}}, "2": {}}
    trials.generate(found, prompts, GenerateOptions(generate=2, new_tokens=5))
    whole = generate_texts(model, prompts, 5)
    for name, plan in plans.items():
        with masked(model, plan):
            cut = generate_texts(model, prompts, 5)
        for domain in ("d", "total"):
            assert found[name][domain]["teacher_generation"] == whole[domain].to_json()
            assert found[name][domain]["generation"] == cut[domain].to_json()
    assert found["5"]["d"]["loss"] == 1.0
    tasks = Counting()
    trials.ask(found, tasks, None, 1)
    assert tasks.asked == 3, "the whole model once"
    for name in plans:
        total = found[name]["total"]
        assert total["tasks"]["count"]["experts,none"] == int(name)
        assert total["teacher_tasks"]["count"]["experts,none"] == 8


def test_alone_and_with_a_teacher(model: Any) -> None:
    for teacher in (None, tiny_model("qwen3_moe")):
        trials = Trials(model, {}, teacher)
        assert trials.reference is teacher and list(trials.variants) == [""]
        found: Found = {"": {}}
        trials.ask(found, Counting(), None, 1)
        assert ("teacher_tasks" in found[""]["total"]) == (teacher is not None)


def test_nothing_is_asked_for() -> None:
    assert TaskOptions().load() is None and GenerateOptions().generate is None
