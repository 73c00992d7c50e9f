"""`reap evaluate`, with a teacher and without."""

import json
import shutil

import pytest
from commandline import MODEL, ended, invoke, refused, run_json


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


def test_generated_texts_and_the_card(work, tmp_path):
    pruned = shutil.copytree(work / "pruned", tmp_path / "pruned")
    data = ("--data", work / "a.txt", "--max-tokens", 256, "--seq-len", 64)
    talk = ("--generate", 3, "--prompt-tokens", 8, "--new-tokens", 12)
    found = run_json("evaluate", pruned, *data, *talk, "--teacher", MODEL, "--card")
    assert found["a"]["generation"]["texts"] == 3
    for key in ("generation", "teacher_generation"):
        assert found["total"][key]["looped_share"]["share"] * 3 == found["total"][key]["looped"]
    record = json.loads((pruned / "reap.json").read_text())["evaluation"]
    assert record["results"] == found and record["against"] == MODEL.name
    assert record["text"]["tokens"] == 256 and record["generation"]["new_tokens"] == 12
    card = (pruned / "README.md").read_text()
    assert "| this model | `total` | 3 |" in card and f"| {found['total']['kl']:.4f} |" in card
    assert run_json("verify", pruned)["compared"] == "the checksums in reap.json"
    plan = work / "plan.json"
    by_plan = run_json("evaluate", MODEL, *data, *talk, "--plan", plan)[str(plan)]
    assert by_plan["total"]["generation"] == found["total"]["generation"]
    assert by_plan["total"]["teacher_generation"] == found["total"]["teacher_generation"]
    table = invoke("evaluate", pruned, *data, *talk, "--teacher", MODEL)[1]
    assert "generated texts" in table and "original" in table


def test_what_cannot_be_generated_or_recorded(work):
    data = ("--data", work / "a.txt", "--max-tokens", 128, "--seq-len", 64)
    talk = ("--generate", 2, "--new-tokens", 8)
    line = refused("evaluate", MODEL, *data, "--generate", 2, "--new-tokens", 250)
    assert (
        "are more than the 256 tokens that the model reads" in line and "--new-tokens 250" in line
    )
    assert "temperature is -1.0" in refused("evaluate", MODEL, *data, *talk, "--temperature", -1)
    assert "give --data, a text, or --tasks" in refused("evaluate", MODEL)
    _, line = ended("evaluate", MODEL, *data, *talk, "--prompt-tokens", 64)
    assert "no row of the text is longer than --prompt-tokens 64: take fewer" in line
    assert "has no reap.json" in refused("evaluate", MODEL, *data, "--card")
    plan = ("--plan", work / "plan.json")
    assert "leave out --plan" in refused("evaluate", MODEL, *data, "--card", *plan)


def test_models_that_do_not_fit_are_refused_before_they_are_loaded(work, monkeypatch):
    from reap.runs import memory

    monkeypatch.setattr(memory, "allowed", lambda: memory.resident() + 1000)
    data = ("--data", work / "a.txt", "--device", "cpu")
    assert "that are free: use a machine with more" in refused("evaluate", MODEL, *data)
    assert "that are free: use a machine with more" in refused("decompose", MODEL, *data)
