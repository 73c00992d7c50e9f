"""Run by a python that has llm-compressor and can import this package: FOLDER ROWS OUT.

The statistics of `oneshot`, which quantises by GPTQ meanwhile, go to OUT/oneshot.safetensors, those
of a plain loop over the same rows, on the same model before it, to OUT/loop.safetensors.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

import reap

folder, file, out = sys.argv[1:]
rows = np.load(file)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
linearize_moe(model)  # `oneshot` would do it, under the eyes of who observes
before = model.lm_head.weight.clone(), model.model.layers[0].self_attn.q_proj.weight.clone()

with reap.observe(model) as stats, torch.no_grad():
    for row in rows:
        ids = torch.from_numpy(row)[None]
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
stats.save(Path(out) / "loop.safetensors")

with reap.observe(model) as stats:
    oneshot(
        model=model,
        dataset=Dataset.from_dict(
            {"input_ids": rows.tolist(), "attention_mask": np.ones_like(rows).tolist()}
        ),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        recipe=GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head", "re:.*gate$"]),
        num_calibration_samples=len(rows),
        max_seq_length=rows.shape[1],
        pipeline="basic",  # every layer once
        moe_calibrate_all_experts=False,
    )
stats.save(Path(out) / "oneshot.safetensors")

# It did its work, and nothing else.
assert torch.equal(model.lm_head.weight, before[0])
assert not torch.equal(model.model.layers[0].self_attn.q_proj.weight, before[1])
