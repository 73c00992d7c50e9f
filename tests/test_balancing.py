"""The auxiliary loss of balanced experts is off while a model is masked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import some_plan
from tiny import tiny_inputs, tiny_model

from reap.errors import ReapError
from reap.model.identity import describe
from reap.runs.generation import generate_texts
from reap.runs.masking import masked


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_omni_moe_thinker"])
def test_of_the_configuration_it_is_off_and_said_so(model_type: str, caplog: Any) -> None:
    model = tiny_model(model_type)
    plan, ids = some_plan(Path(), 5, model=describe(model)), tiny_inputs(model)["input_ids"]
    with torch.no_grad(), masked(model, plan):
        expected = model(input_ids=ids, labels=ids)
    assert not caplog.text
    config = model.config.get_text_config()
    config.output_router_logits = True
    with torch.no_grad(), masked(model, plan):
        for _ in range(2):
            found = model(input_ids=ids, labels=ids)
    assert torch.equal(found.logits, expected.logits) and found.loss == expected.loss
    assert found.aux_loss is None and caplog.text.count("is off while the model") == 1
    assert config.output_router_logits and model(input_ids=ids).aux_loss is not None


def test_a_call_that_asks_for_it_is_refused() -> None:
    model = tiny_model("qwen3_moe")
    plan, ids = some_plan(Path(), 5, model=describe(model)), tiny_inputs(model)["input_ids"]
    ran: list[Any] = []
    model.model.register_forward_pre_hook(lambda *_: ran.append(1))
    with masked(model, plan):
        with pytest.raises(ReapError, match="Qwen3MoeForCausalLM does not have while it is masked"):
            model(input_ids=ids, output_router_logits=True)
        assert not ran
        logits = model.base_model(input_ids=ids, output_router_logits=True).router_logits
        assert {each.shape[-1] for each in logits} == {5}
        assert model(input_ids=ids, output_router_logits=False).router_logits is None
    assert model(input_ids=ids, output_router_logits=True).aux_loss is not None


def test_texts_are_generated_without_it() -> None:
    model = tiny_model("qwen3_moe")
    plan = some_plan(Path(), 5, model=describe(model))
    prompts = {"d": torch.ones(2, 4, dtype=torch.int64)}
    with masked(model, plan):
        expected = generate_texts(model, prompts, 3)
        model.config.output_router_logits = True
        assert generate_texts(model, prompts, 3) == expected
