"""The trained model that ships with the sources is what its training record says it is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from reap.runs.evaluation import evaluate
from reap.text.batching import batches

FOLDER = Path(__file__).parent.parent / "models" / "tiny-qwen3-moe"
RECORD = json.loads((FOLDER / "training.json").read_text())
DOMAINS = ("code", "prose")


@pytest.fixture(scope="module")
def loaded():
    model, info = AutoModelForCausalLM.from_pretrained(
        FOLDER, dtype=torch.float32, output_loading_info=True
    )
    return model.eval(), info


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def test_looks_like_a_checkpoint_from_the_hub():
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["num_experts"] == 16 and "num_local_experts" not in config
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        names = set(file.keys())
        last = file.get_slice("model.layers.3.mlp.experts.15.down_proj.weight")
        assert (last.get_dtype(), last.get_shape()) == ("BF16", [192, 80])
    experts = {name for name in names if ".experts." in name}
    assert len(experts) == config["num_hidden_layers"] * 16 * 3
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8_000_000


def test_loads_without_a_flag(loaded):
    model, info = loaded
    assert not any(info.values()), info
    assert sum(p.numel() for p in model.parameters()) == RECORD["parameters"]


@pytest.mark.sweep
def test_predicts_held_out_text_as_recorded(loaded, tokenizer):
    data = batches(
        [f"stdlib:{domain}/heldout" for domain in DOMAINS],
        tokenizer,
        seq_len=RECORD["seq_len"],
        batch_size=16,
        max_tokens=32_768,
    )
    results = evaluate(loaded[0], data)
    for domain in DOMAINS:
        record = RECORD["domains"][domain]
        assert record["heldout"]["loss"] < 0.75 * record["heldout_unigram_entropy"]
        # A part of the held-out text, and of whichever Python runs this.
        assert results[domain].loss == pytest.approx(record["heldout"]["loss"], rel=0.15)


def test_every_expert_is_used(loaded, tokenizer):
    data = batches(
        ["stdlib:code/heldout", "stdlib:prose/heldout"],
        tokenizer,
        seq_len=256,
        batch_size=8,
        max_tokens=8192,
    )
    counts = torch.zeros(4, 16, dtype=torch.int64)
    for batch in data:
        with torch.inference_mode():
            out = loaded[0](
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                output_router_logits=True,
            )
        chosen = torch.stack(out.router_logits)[:, batch.attention_mask.flatten().bool()].topk(2)
        counts = counts + torch.nn.functional.one_hot(chosen.indices, 16).sum((1, 2))
    assert counts.min() > 0
    for record in (
        *(RECORD["domains"][d]["heldout"] for d in DOMAINS),
        RECORD["half_code_half_prose"],
    ):
        assert min(record["expert_load_min_over_mean"]) > 0


def test_tokenizer(tokenizer):
    text = "def f(x):\n        return 'é' * 3  # ∑\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    turns = [{"role": "user", "content": "hi"}]
    chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.convert_ids_to_tokens([0, 1]) == ["<|endoftext|>", "<|pad|>"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
