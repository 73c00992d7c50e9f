"""`reap evaluate`, with a teacher and without."""

import json

import pytest
from commandline import MODEL, invoke, run_json


def test_plan_prune_evaluate(work):
    pruned = work / "pruned"
    plan = json.loads((work / "plan.json").read_text())
    config = json.loads((MODEL / "config.json").read_text())
    kept = {len(layer["kept"]) for layer in plan["layers"].values()}
    assert kept == {config["num_experts"] // 2}
    assert json.loads((pruned / "config.json").read_text())["num_experts"] == kept.pop()
    data = ("--data", work / "a.txt", "--max-tokens", 256, "--seq-len", 64)
    same = run_json("evaluate", MODEL, *data, "--teacher", MODEL)["total"]
    assert same["kl"] == pytest.approx(0, abs=1e-6) and same["agreement"] == 1
    changed = run_json("evaluate", pruned, *data, "--teacher", MODEL)["total"]
    assert changed["kl"] > 0.01 and changed["agreement"] < 1
    assert changed["tokens"] == same["tokens"]
    assert changed["teacher_loss"] == same["teacher_loss"] == same["loss"] != changed["loss"]
    assert "teacher_loss" not in run_json("evaluate", MODEL, *data)["total"]
    table = invoke("evaluate", pruned, *data, "--teacher", MODEL)[1]
    assert f"{same['loss']:.4f}" in table and "teacher's loss" in table
    assert max(len(line.rstrip()) for line in table.splitlines()[1:]) <= 80


def test_without_a_terminal_one_line_says_what_runs(work):
    command = ("evaluate", MODEL, "--data", work / "a.txt", "--max-tokens", 128, "--seq-len", 64)
    _, out, err = invoke(*command, "--teacher", work / "pruned")
    assert err == (
        f"reap: evaluating: {MODEL}, against {work / 'pruned'}, BF16 as stored on cpu, about 128 "
        "tokens in rows of 64, 1 at a time\n"
    )
    assert "\x1b" not in out
