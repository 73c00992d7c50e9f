"""Run by a python that has llmcompressor: times its REAP and a plain forward, prints JSON.

Argument: {"config": fields of a Qwen3MoeConfig, "dtype", "length", "rows", "threads"}.
"""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.pruning import REAPPruningModifier
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig

ROUNDS = 2


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    ids = torch.randint(job["config"]["vocab_size"], (job["rows"], job["length"]))
    names = ("llm-compressor", "llm-compressor's plain forward")
    ms: dict[str, list[float]] = {name: [] for name in names}
    folder = tempfile.mkdtemp()
    Qwen3MoeConfig(**job["config"]).save_pretrained(folder)
    for _ in range(ROUNDS):
        model = build(job)  # anew: the pipeline prunes it
        model.name_or_path = model.config._name_or_path = folder  # it reads the config once more
        forward(model, ids[:1])
        ms[names[1]].append(timed(forward, model, ids))
        linearize_moe(model)  # a checkpoint can be loaded like this, so it is not timed
        ms[names[0]].append(timed(calibrate, model, ids))
    shutil.rmtree(folder)
    packages = ("torch", "transformers", "llmcompressor")
    print(json.dumps({"ms": ms, "versions": {name: version(name) for name in packages}}))


def timed(call: Callable, *arguments: object) -> float:
    start = time.perf_counter()
    call(*arguments)
    return 1e3 * (time.perf_counter() - start)


def build(job: dict) -> torch.nn.Module:
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[job["dtype"]]
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
        tokenizer=_tokenizer(),
        recipe=REAPPruningModifier(sparsity=0.5),
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        moe_calibrate_all_experts=False,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """The pipeline asks for one, though the rows are tokens already."""
    words = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="?")


main()
