"""Run by a python that has torch and transformers 4.55: SOURCES FOLDER ROWS RENORMALISED OUT.

What the observer of the checkout CerebrasResearch/reap, whose src SOURCES is, makes of the model
in FOLDER over ROWS [rows, length], to OUT: per layer "COUNT.NAME" arrays [E].
"""

import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM

sources, folder, file, renormalised, out = sys.argv[1:]
sys.path.insert(0, sources)
from reap.observer import OBSERVER_CONFIG_REGISTRY, MoETransformerObserver  # noqa: E402

NAMES = ("expert_frequency", "ean_sum", "weighted_ean_sum", "weighted_expert_frequency_sum", "reap")
model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
what = OBSERVER_CONFIG_REGISTRY[type(model).__name__](
    renormalize_router_weights=renormalised == "True", record_pruning_metrics_only=True
)
observer = MoETransformerObserver(model, hook_config=what)
with torch.no_grad():
    for row in np.load(file):
        model(input_ids=torch.from_numpy(row)[None], use_cache=False)
state = observer.report_state()
found = {f"{layer}.{name}": state[layer][name].numpy() for layer in state for name in NAMES}
np.savez(out, **found)
