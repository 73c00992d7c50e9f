"""Run by a python that has llmcompressor: times its REAP and a plain forward, prints JSON.

Argument: {"config": fields of a Qwen3MoeConfig, "dtype", "length", "rows"}.
"""

import json
import sys
import time
from importlib.metadata import version

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import REAPPruningModifier
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

ROUNDS = 2


def main() -> None:
    job = json.loads(sys.argv[1])
    ids = torch.randint(job["config"]["vocab_size"], (job["rows"], job["length"]))
    names = ("llm-compressor", "llm-compressor's plain forward")
    ms: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        model = build(job)  # anew: the pipeline prunes it
        forward(model, ids[:1])
        for name, call in zip(names[::-1], (forward, calibrate), strict=True):
            start = time.perf_counter()
            call(model, ids)
            ms[name].append(1e3 * (time.perf_counter() - start))
    packages = ("torch", "transformers", "llmcompressor")
    print(json.dumps({"ms": ms, "versions": {name: version(name) for name in packages}}))


def build(job: dict) -> torch.nn.Module:
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[job["dtype"]]
    return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**job["config"]), dtype=dtype).eval()


@torch.no_grad()
def forward(model: torch.nn.Module, ids: torch.Tensor) -> None:
    for row in ids:
        model(input_ids=row[None], use_cache=False)


def calibrate(model: torch.nn.Module, ids: torch.Tensor) -> None:
    rows = Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    )
    oneshot(
        model=model,
        dataset=rows,
        recipe=REAPPruningModifier(sparsity=0.5),
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        moe_calibrate_all_experts=False,
    )


main()
