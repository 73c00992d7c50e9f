"""The two models of the experiments are what their training records say they are."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from experiments.rows import held_out
from experiments.setting import MODELS
from experiments.texts import DOMAINS
from reap.model.load import load_tokenizer
from reap.runs.evaluation import evaluate

EXPERTS, LAYERS = 32, 4


@pytest.fixture(scope="module", params=sorted(MODELS))
def router(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def record(router: str) -> dict[str, Any]:
    return json.loads((MODELS[router] / "training.json").read_text())


def test_looks_like_a_checkpoint_from_the_hub(router: str) -> None:
    folder = MODELS[router]
    config = json.loads((folder / "config.json").read_text())
    counted = {"softmax": "num_experts", "sigmoid": "n_routed_experts"}[router]
    assert config[counted] == EXPERTS and "num_local_experts" not in config
    with safe_open(folder / "model.safetensors", "pt") as file:
        experts = {name for name in file.keys() if ".experts." in name}
        biases = [file.get_tensor(n) for n in file.keys() if n.endswith("e_score_correction_bias")]
    assert len(experts) == LAYERS * EXPERTS * 3
    assert len(biases) == (LAYERS if router == "sigmoid" else 0)
    assert all(bias.std() > 0.01 for bias in biases)  # they hold the load
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8_000_000


def test_loads_without_a_flag_and_predicts_as_recorded(router: str, record: dict[str, Any]) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(
        MODELS[router], dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    found = evaluate(model, held_out(load_tokenizer(MODELS[router]), 2_048, record["seq_len"]))
    for domain in DOMAINS:  # of a piece of every document, where the record has all of each
        recorded = record["domains"][domain]
        assert found[domain].loss < recorded["heldout"]["loss"] + 0.7
        assert found[domain].loss < 0.6 * recorded["heldout_unigram_entropy"]
