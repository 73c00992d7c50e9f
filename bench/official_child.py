"""Run by a python that has torch and transformers 4.55: times the observer of the checkout
CerebrasResearch/reap (what its pruning needs, without its merging criteria) and a plain forward,
prints JSON.

Argument: {"config": fields of a Qwen3MoeConfig, "dtype", "length", "rows", "threads",
"sources": the checkout's src}.
"""

import json
import sys
import time
from importlib.metadata import version

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

ROUNDS = 2


def main() -> None:
    job = json.loads(sys.argv[1])
    sys.path.insert(0, job["sources"])
    from reap.observer import OBSERVER_CONFIG_REGISTRY, MoETransformerObserver

    torch.set_num_threads(job["threads"])
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[job["dtype"]]
    config = Qwen3MoeConfig(**job["config"])
    model = AutoModelForCausalLM.from_config(config, torch_dtype=dtype).eval()
    ids = torch.randint(config.vocab_size, (job["rows"], job["length"]))
    what = OBSERVER_CONFIG_REGISTRY[type(model).__name__](
        renormalize_router_weights=True, record_pruning_metrics_only=True
    )
    ms: dict[str, list[float]] = {"official": [], "official's plain forward": []}
    forward(model, ids[:1, :8])
    for _ in range(ROUNDS):
        ms["official's plain forward"].append(forward(model, ids))
        observer = MoETransformerObserver(model, hook_config=what)
        ms["official"].append(forward(model, ids))
        observer.close_hooks()
    packages = ("torch", "transformers")
    print(json.dumps({"ms": ms, "versions": {name: version(name) for name in packages}}))


@torch.no_grad()
def forward(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    for row in ids:
        model(input_ids=row[None], use_cache=False)
    return 1e3 * (time.perf_counter() - start)


main()
