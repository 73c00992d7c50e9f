"""The official repository's observer and ours have the same numbers for the same model and tokens.

REAP_OFFICIAL names a checkout of CerebrasResearch/reap whose .venv has torch and transformers 4.55;
without it the test is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import saved

import reap

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent / "others" / "official_observer.py"
OFFICIAL = Path(os.environ.get("REAP_OFFICIAL", ""))


@pytest.mark.parametrize(
    ("model_type", "renormalised"),
    [("qwen3_moe", True), ("qwen3_moe", False), ("mixtral", True)],
)
def test_same_numbers(model_type: str, renormalised: bool, tmp_path: Path) -> None:
    if not os.environ.get("REAP_OFFICIAL"):
        pytest.skip("REAP_OFFICIAL names no checkout of the official repository")
    fields = {"norm_topk_prob": renormalised} if model_type == "qwen3_moe" else {}
    model = saved(tmp_path / "model", model_type, **fields).float().eval()
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    older = {**config, "rope_theta": config["rope_parameters"]["rope_theta"], "rope_scaling": None}
    if "num_experts" not in config and model_type == "qwen3_moe":
        older["num_experts"] = config["num_local_experts"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(older))
    rows = np.random.default_rng(0).integers(0, config["vocab_size"], (4, 32))
    np.save(tmp_path / "rows.npy", rows)
    with reap.observe(model) as stats, torch.no_grad():
        for row in rows:
            model(input_ids=torch.from_numpy(row)[None], use_cache=False)

    python = OFFICIAL / ".venv" / "bin" / "python"
    given = [OFFICIAL / "src", tmp_path / "model", tmp_path / "rows.npy", renormalised]
    command = [python, "-I", SCRIPT, *given, tmp_path / "theirs.npz"]
    subprocess.run(list(map(str, command)), check=True)
    theirs = np.load(tmp_path / "theirs.npz")
    assert {key.split(".")[0] for key in theirs} == {str(i) for i in range(len(stats.layers))}
    for number, name in enumerate(stats.layers):
        ours = stats[name]
        count = np.asarray(ours.count)
        assert np.array_equal(theirs[f"{number}.expert_frequency"], count)
        pairs = {
            "ean_sum": ours.norm_sum,
            "weighted_ean_sum": ours.weighted_sum,
            "weighted_expert_frequency_sum": ours.gate_sum,
            "reap": np.asarray(ours.weighted_sum) / np.maximum(count, 1),
        }
        for field, values in pairs.items():
            found = theirs[f"{number}.{field}"]
            np.testing.assert_allclose(
                found, np.asarray(values), rtol=2e-5, err_msg=f"{name} {field}"
            )
