"""Is pruning as fast as copying? Half of a synthetic checkpoint's experts, against `cp -r`; then of
one of tiny experts, as many as Kimi-K2 has: 208,000 tensors, whose names and shapes take the time.

Both write the same bytes: what is copied is the pruned checkpoint. `prune` also checks, reads back
and syncs to the disk, which `cp -r` does not: the row `cp -r; sync` is the copy that a power cut
leaves whole. `extra_bytes` is the peak resident memory of the whole pruning process.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.measure import Samples, Settings, rows
from bench.row import Row

HIDDEN, INNER, EXPERTS = 2048, 768, 128  # Qwen3-30B-A3B
SMALL, SMALL_LAYERS = (8, 8, 1138), 61
SHARD_BYTES = 1 << 30


def run(settings: Settings) -> Iterator[Row]:
    large = _smaller(settings.gigabytes) if settings.smoke else (HIDDEN, INNER, EXPERTS)
    layers = max(1, round(settings.gigabytes * 1e9 / (large[2] * 3 * large[0] * large[1] * 2)))
    root = settings.scratch / "prune"
    for size, depth in ((large, layers), (SMALL, SMALL_LAYERS))[: 1 if settings.smoke else 2]:
        shutil.rmtree(root, ignore_errors=True)
        try:
            yield from _checkpoint(settings, root, size, depth)
        finally:
            shutil.rmtree(root, ignore_errors=True)


def _checkpoint(
    settings: Settings, root: Path, size: tuple[int, int, int], layers: int
) -> Iterator[Row]:
    base, plan = root / "base", root / "plan.json"
    total = write_checkpoint(base, layers, *size)
    write_plan(base, plan)
    pruned, copy = root / "pruned", root / "copy"
    child = [sys.executable, "-c", _CHILD, str(base), str(plan), str(pruned)]
    unread = [*child, "--no-verify"]
    copying = ["cp", "-r", str(pruned), str(copy)]
    synced = ["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', str(pruned), str(copy)]
    peaks = []

    def prune(command: list[str]) -> float:
        shutil.rmtree(pruned, ignore_errors=True)
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds, peak = done.stdout.split()[-2:]
        peaks.append(int(peak))
        return float(seconds)

    impls: dict[str, Callable[[], float]] = {
        "reap": lambda: prune(child),
        "reap --no-verify": lambda: prune(unread),
        "cp -r": lambda: _timed(copying),
        "cp -r; sync": lambda: _timed(synced),
    }
    samples = Samples({name: [] for name in impls}, [])
    for _ in range(settings.rounds):
        for name, call in impls.items():
            shutil.rmtree(copy, ignore_errors=True)
            os.sync()
            samples.ms[name].append(1e3 * call())
    shape = f"{total / 1e9:.2g} GB, E{size[2]} H{size[0]} I{size[1]} L{layers}"
    yield from rows("prune", ("-", shape, 0), samples, extra={"reap": max(peaks)})


# In a process of its own, so that the peak is prune's. Importing transformers is not timed:
# describing the folder once before does that.
_CHILD = """
import resource, sys, time, reap
from reap.files.folder import open_folder
from reap.model.identity import describe_folder
from reap.model.shapes import loading_problems
plan = reap.Plan.load(sys.argv[2])
describe_folder(sys.argv[1])
loading_problems(open_folder(sys.argv[1]).config, {})
reap.prune
start = time.perf_counter()
reap.prune(sys.argv[1], plan, sys.argv[3], verify=len(sys.argv) == 4)
print(time.perf_counter() - start)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def _timed(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - start


def _smaller(gigabytes: float) -> tuple[int, int, int]:
    return 64, max(8, math.ceil(gigabytes * 1e9 / (16 * 3 * 64 * 2)) // 8 * 8), 16


def write_checkpoint(
    folder: Path, layers: int, hidden: int, inner: int, experts: int, noise: bytes | None = None
) -> int:
    """A Qwen3-MoE checkpoint of random bytes, or of `noise` again and again: bf16 shards, an index.
    Returns its tensors' bytes."""
    from reap.files.safefile import encode_header, span

    folder.mkdir(parents=True)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": hidden,
        "num_hidden_layers": layers, "num_experts": experts, "num_experts_per_tok": 8,
        "moe_intermediate_size": inner, "intermediate_size": inner, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 256, "dtype": "bfloat16",
        "norm_topk_prob": True, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    filled = 0
    for name, shape in _tensors(layers, hidden, inner, experts):
        if filled + span("BF16", shape) > SHARD_BYTES and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][name] = ("BF16", shape)
        filled += span("BF16", shape)
    noise, weight_map, total = noise or os.urandom(8 << 20), {}, 0
    for i, tensors in enumerate(shards):
        path = folder / f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        left = sum(span(*tensor) for tensor in tensors.values())
        total += left
        with open(path, "wb") as file:
            file.write(encode_header(tensors, {"format": "pt"}))
            while left:
                left -= file.write(noise[:left])
        weight_map.update(dict.fromkeys(tensors, path.name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _tensors(
    layers: int, hidden: int, inner: int, experts: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (256, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (256, hidden)
    for i in range(layers):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}.weight", (hidden,)
        for norm in ("q_norm", "k_norm"):
            yield f"{layer}.self_attn.{norm}.weight", (16,)
        for projection in ("q_proj", "k_proj", "v_proj"):
            yield f"{layer}.self_attn.{projection}.weight", (64, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, 64)
        yield f"{layer}.mlp.gate.weight", (experts, hidden)
        for j in range(experts):
            for projection in ("gate_proj", "up_proj"):
                yield f"{layer}.mlp.experts.{j}.{projection}.weight", (inner, hidden)
            yield f"{layer}.mlp.experts.{j}.down_proj.weight", (hidden, inner)


def write_plan(base: Path, path: Path) -> None:
    """A plan that keeps every second expert: the least contiguous, so the hardest to copy."""
    from reap.model.identity import describe_folder
    from reap.planning.plan import Plan

    model = describe_folder(base)
    kept = {layer.name: tuple(range(0, layer.num_experts, 2)) for layer in model.layers}
    Plan(model=model, criterion="random", seed=0, kept=kept).save(path)
