"""`reap evaluate`, with a teacher and without."""

import json

import pytest
from commandline import MODEL, invoke, refused, run_json


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


def test_many_plans_in_one_pass(work):
    data = ("--data", work / "a.txt", "--max-tokens", 256, "--seq-len", 64)
    half, every = work / "plan.json", work / "all.json"
    found = run_json("evaluate", MODEL, *data, "--plan", half, "--plan", every)
    assert list(found) == [str(half), str(every)]
    pruned = run_json("evaluate", work / "pruned", *data, "--teacher", MODEL)
    for domain, figures in pruned.items():
        assert found[str(half)][domain] == pytest.approx(figures, rel=1e-5)
    assert found[str(every)]["total"]["kl"] == 0
    against = run_json("evaluate", MODEL, *data, "--plan", half, "--teacher", work / "pruned")
    assert against[str(half)]["total"]["kl"] == pytest.approx(0, abs=1e-6)
    _, table, err = invoke("evaluate", MODEL, *data, "--plan", half, "--plan", every)
    assert "masked by 2 plans, against the whole model" in err
    lines = table.splitlines()
    assert lines[1].split()[:3] == ["plan", "domain", "tokens"] and str(every) in lines[-1]


def test_plans_that_cannot_be_tried(work, tmp_path):
    data = ("--data", work / "a.txt", "--max-tokens", 128, "--seq-len", 64)
    half = work / "plan.json"
    assert "is given twice" in refused("evaluate", MODEL, *data, "--plan", half, "--plan", half)
    assert "not a plan" in refused("evaluate", MODEL, *data, "--plan", work / "one.st")
    other = json.loads(half.read_text())
    other["model"]["layers"][0]["top_k"] += 1
    (tmp_path / "other.json").write_text(json.dumps(other))
    line = refused("evaluate", MODEL, *data, "--plan", tmp_path / "other.json")
    assert "made for another model" in line and "top_k" in line
    assert "made for another model" in refused("evaluate", work / "pruned", *data, "--plan", half)
