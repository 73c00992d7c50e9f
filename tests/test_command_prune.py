"""`reap prune` and `reap verify`, with names of any bytes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import processes
import pytest
from commandline import MODEL, run_json
from mtps import saved_with_mtp


@pytest.mark.sweep
def test_names_that_are_not_utf_8(work, tmp_path):
    """Any bytes but / and 0 are a name on Linux; what cannot be said in UTF-8 is escaped."""
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    for command in (
        ["plan", work / "one.st", "--keep", "8", "--out", folder + b"/plan.json"],
        ["prune", MODEL, folder + b"/plan.json", folder + b"/out", "--json"],
        ["verify", folder + b"/out"],
        ["score", folder + b"/none.st"],
    ):
        line = [sys.executable, "-m", "reap", *command]
        if command[0] == "score":  # a process from its beginning, which reads its arguments itself
            done = subprocess.run(line, capture_output=True)
        else:
            done = processes.run([os.fsdecode(word) for word in line])
        assert done.returncode == (2 if command[0] == "score" else 0), done.stderr
        assert b"internal error" not in done.stderr
        if "--json" in command:
            assert os.fsencode(json.loads(done.stdout)["out"]) == folder + b"/out"


def test_multi_token_prediction(tmp_path: Path) -> None:
    """From calibration to the pruned model, with the layer and without; each says what it does."""
    model = tmp_path / "model"
    made = saved_with_mtp(model, "glm4_moe", vocab_size=8192)
    for file in MODEL.glob("*token*"):
        shutil.copy(file, model)
    assert run_json("info", model)["mtp"] == "model.layers.4"
    few = ("--data", "stdlib:code", "--max-tokens", 200, "--seq-len", 20)
    for option, layers, said in (
        ("--mtp", 4, ": model.layers.4 counted too, `reap prune` will keep it"),
        ("--no-mtp", 3, " is left out, `reap prune` will drop it: --no-mtp"),
    ):
        stats, plan, out = (tmp_path / f"{name}{option}" for name in ("stats", "plan", "out"))
        told = run_json("calibrate", model, *few, "--out", stats, option)
        assert told["layers"] == layers and told["notes"] == [f"multi-token prediction{said}"]
        run_json("plan", stats, "--keep", 4, "--out", plan)
        report = run_json("prune", model, plan, out)
        assert bool(report["mtp_layers"]) == (option == "--mtp") != bool(report["dropped_layers"])
        found = run_json("verify", out, "--source", model)
        assert (made.names.experts in found["experts"]) == (option == "--mtp")
    assert run_json("info", out)["mtp"] == "none with experts"
