"""`reap plan` of one budget for all layers, and what the other commands make of its plan."""

import json
import re

import pytest
from commandline import MODEL, invoke, refused, run_json


def test_one_budget_from_plan_to_evaluation(work, tmp_path):
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    options = ("--scope", "global", "--total", 30, "--min-per-layer", 4)
    told = run_json("plan", work / "one.st", *options, "--out", plan)
    counts = list(told["kept"].values())
    assert told["total"] == sum(counts) == 30 and min(counts) >= 4 and len(set(counts)) > 1
    assert any("reap.load_model" in note for note in told["notes"])
    said = invoke("plan", work / "one.st", *options, "--out", plan, "--overwrite")[1]
    assert f"keeps {min(counts)} to {max(counts)} experts in each of 4 layers, 30 in all" in said
    assert run_json("info", plan)["kept"] == sorted(set(counts))

    report = run_json("prune", MODEL, plan, out)
    assert list(report["kept"].values()) == counts and report["unchecked"] is None
    found = run_json("info", out)
    assert found["experts"] == sorted(set(counts)) and found["loaded_by"] == "reap"
    assert list(run_json("verify", out, "--source", MODEL)["experts"].values()) == counts
    data = ("--data", work / "a.txt", "--max-tokens", 256, "--seq-len", 64)
    pruned = run_json("evaluate", out, *data, "--teacher", MODEL)["total"]
    tried = run_json("evaluate", MODEL, *data, "--plan", plan)[str(plan)]["total"]
    assert tried == pytest.approx(pruned, rel=1e-5)
    run_json("calibrate", out, *data, "--out", tmp_path / "again.st")


def test_rules_and_multiples(work, tmp_path):
    plans = {}
    for rule in ("raw", "mean", "share"):
        options = ("--scope", "global", "--ratio", 0.5, "--multiple-of", 4, "--normalize", rule)
        told = run_json("plan", work / "one.st", *options, "--out", tmp_path / f"{rule}.json")
        assert told["total"] == 32 and all(n % 4 == 0 for n in told["kept"].values())
        plans[rule] = json.loads((tmp_path / f"{rule}.json").read_text())
        assert plans[rule]["options"]["normalize"] == rule
    assert plans["mean"]["layers"] == plans["share"]["layers"] != plans["raw"]["layers"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--scope", "global", "--total", 7), "at least 8: the nearest that works is total 8"),
        (("--scope", "global", "--total", 34, "--multiple-of", 4), "multiple of 4: .* total 36"),
        (("--scope", "global", "--total", 30, "--keep", 8), "exactly one of ratio, keep and total"),
        (("--scope", "both", "--keep", 8), "scope is 'both'"),
        (("--scope", "global", "--keep", 8, "--normalize", "max"), "normalize is 'max'"),
        (
            ("--keep", 8, "--min-per-layer", 4),
            "--min-per-layer is of one budget for all layers: pass --scope global too",
        ),
        (("--total", 40), "total is of one budget for all layers: pass --scope global too"),
        (("--keep", 8, "--normalize", "raw"), "normalize is of one budget for all layers"),
    ],
)
def test_budgets_that_cannot_be_met(options, message, work, tmp_path):
    line = refused("plan", work / "one.st", *options, "--out", tmp_path / "plan.json")
    assert re.search(message, line), line
    assert not (tmp_path / "plan.json").exists()


def test_compress_with_one_budget(work, tmp_path):
    text = ("--data", work / "a.txt", "--seq-len", 64, "--max-tokens", 256)
    options = ("--scope", "global", "--keep", 8, "--min-per-layer", 3)
    done = run_json("compress", MODEL, tmp_path / "out", *text, *options)
    assert done["plan"]["total"] == 32 == sum(done["prune"]["kept"].values())
    line = refused("compress", MODEL, tmp_path / "x", *text, "--scope", "global", "--total", 7)
    assert "the nearest that works is total 8" in line
