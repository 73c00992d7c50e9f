"""`reap group`, `reap merge` and `reap decompose`, on the shipped model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commandline import MODEL, invoke, refused, run_json

from reap.merging.mergeplan import Merge
from reap.merging.tying import merged
from reap.model.load import load_model

FEW = ("--max-tokens", 512, "--seq-len", 64, "--batch-size", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With statistics of expert outputs, and without."""
    folder = tmp_path_factory.mktemp("merging")
    (folder / "a.txt").write_text("def f(x):\n    return x + 1\n" * 400)
    for name, options in (("with", ["--outputs"]), ("without", [])):
        code, _, err = invoke(
            "calibrate", MODEL, "--data", folder / "a.txt", *FEW, *options,
            "--out", folder / name,
        )  # fmt: skip
        assert code == 0, err
    return folder


def test_from_statistics_to_a_model(folder: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "merge.json", tmp_path / "out"
    told = run_json("group", folder / "with", "--ratio", 0.5, "--out", plan)
    assert told["left"] == Merge.load(plan).left and told["alone"] < sum(told["left"].values())
    report = run_json("merge", MODEL, plan, out)
    assert report["left"] == told["left"] and report["verify_seconds"] is not None
    found = run_json("verify", out)
    assert found["compared"] == "the checksums in reap.json" and not found["problems"]
    about = run_json("info", out)
    assert about["kind"] == "merged model" and about["method"] == "hc-smoe"
    assert run_json("info", plan)["kind"] == "merge"
    assert json.loads((out / "reap.json").read_text())["command"].split()[0] == "reap"

    ids = torch.arange(20)[None] + 40
    model = load_model(MODEL)
    with torch.no_grad(), merged(model, plan):
        truth = model(ids).logits
    assert torch.equal(load_model(out)(ids).logits, truth)
    lines = invoke("merge", MODEL, plan, tmp_path / "again")[1]
    assert "as large as the original" in lines
    told = {
        size: invoke("group", folder / "with", *size, "--out", tmp_path / f"{size[1]}.json")[1]
        for size in (("--groups", 3), ("--groups", 1), ("--ratio", 1e-300))
    }
    three, one, none = told.values()
    assert "3 different experts in each of 4 layers" in three and "note" not in three
    assert "1 different expert in each of 4 layers" in one
    assert "note: joins no experts: a model merged by it would be a copy" in none


def test_m_smoe_reads_the_router_of_the_model(folder: Path, tmp_path: Path) -> None:
    told = run_json(
        *("group", folder / "without", "--method", "m-smoe", "--model", MODEL),
        *("--ratio", 0.5, "--scope", "global", "--out", tmp_path / "m.json"),
    )
    assert told["method"] == "m-smoe" and Merge.load(tmp_path / "m.json").left == told["left"]


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "m.json")
    stats = folder / "without"
    assert "calibrate --outputs" in refused("group", stats, "--ratio", 0.5, *out)
    assert "exactly one of" in refused("group", folder / "with", *out)
    assert "--model is of --method m-smoe" in refused(
        "group", folder / "with", "--ratio", 0.5, "--model", MODEL, *out
    )
    assert "reap group --model MODEL" in refused(
        "group", stats, "--ratio", 0.5, "--method", "m-smoe", *out
    )
    assert "--revision is of --model" in refused(
        "group", folder / "with", "--ratio", 0.5, "--revision", "v1", *out
    )
    assert "is read: choose another place" in refused(
        "group", stats, "--ratio", 0.5, "--out", stats, "--overwrite"
    )
    assert "is statistics, not a merge" in refused("merge", MODEL, stats, tmp_path / "out")
    assert not (tmp_path / "m.json").exists() and not (tmp_path / "out").exists()


def test_decompose(folder: Path) -> None:
    text = ("--data", folder / "a.txt", *FEW, "--tokens", 100, "--least", 4, "--pairs", 3)
    found = run_json("decompose", MODEL, *text)
    assert {layer["tokens"] for layer in found.values()} == {100}
    assert all(len(layer["by_pair"]) == layer["pairs"] <= 3 for layer in found.values())
    code, out, err = invoke("decompose", MODEL, *text)
    assert code == 0 and "mean weights" in out and next(iter(found)) in out
    assert err.startswith("reap: decomposing: ")


def test_sums_of_outputs_are_a_difference(folder: Path) -> None:
    found = run_json("diff", folder / "with", folder / "without")
    assert [one["what"] for one in found["differences"]] == ["outputs"] and not found["same"]


def test_decompose_says_where_no_pair_was_chosen(folder: Path) -> None:
    code, out, _ = invoke("decompose", MODEL, "--data", folder / "a.txt", *FEW, "--least", 10**6)
    assert code == 0 and "in 4 of 4 layers no pair of experts was chosen by 1,000,000 of" in out
