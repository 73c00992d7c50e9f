"""`reap compress`: the three commands as one, everything checked before the expensive part."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
from commandline import MODEL, ended, invoke, refused, run_json

from reap.errors import ReapError
from reap.statistics.stats import Statistics
from reap.text import batching

TEXT = ("--seq-len", 64, "--batch-size", 2, "--max-tokens", 512)


def command(work: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("compress", MODEL, out, "--data", work / "a.txt", *TEXT, *more)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_same_as_three_commands(work: Path, tmp_path: Path) -> None:
    options = ("--ratio", 0.25, "--criterion", "ean", "--multiple-of", 4)
    printed = run_json(*command(work, tmp_path / "x", *options))
    assert list(printed) == ["calibrate", "plan", "prune"]
    assert names(tmp_path) == ["x", "x.plan.json", "x.stats.safetensors"]
    stats = tmp_path / "three.st"
    run_json("calibrate", MODEL, "--data", work / "a.txt", *TEXT, "--out", stats)
    run_json("plan", stats, *options, "--out", tmp_path / "three.json")
    run_json("prune", MODEL, tmp_path / "three.json", tmp_path / "three")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
    first, second = (json.loads((tmp_path / n).read_text()) for n in ("x.plan.json", "three.json"))
    assert first == second
    digests = {Statistics.load(path).digest() for path in (tmp_path / "x.stats.safetensors", stats)}
    assert len(digests) == 1
    code, out, err = invoke(*command(work, tmp_path / "x", "--keep", 8, "--overwrite"))
    assert code == 0 and "keeps 8 experts" in out and "num_experts: 16 -> 8" in out
    assert [line.split(":")[1] for line in err.splitlines()] == [" calibrating", " pruning"]
    assert json.loads((tmp_path / "x" / "reap.json").read_text())["criterion"] == "reap"


# What is wrong, and what the answer must name.
EARLY: dict[str, tuple[tuple[object, ...], str]] = {
    "no size": ((), "exactly one of ratio and keep"),
    "two sizes": (("--ratio", 0.5, "--keep", 8), "exactly one of ratio and keep"),
    "ratio of all": (("--ratio", 1), "ratio is 1"),
    "unknown criterion": (("--ratio", 0.5, "--criterion", "best"), "criterion is 'best'"),
    "fewer than top-k": (("--keep", 1), "its router picks 2 per token"),
    "more than there are": (("--keep", 17), "there are not that many"),
    "no such multiple": (("--ratio", 0.5, "--multiple-of", 32), "no multiple of 32 works"),
    "nothing dropped": (("--ratio", 0.01), "no expert would be dropped"),
    "rounded up to nothing": (("--keep", 12, "--multiple-of", 16), "no expert would be dropped"),
    "unknown gates": (("--ratio", 0.5, "--gates", "odd"), "renormalized"),
    "no such revision": (("--ratio", 0.5, "--revision", "main"), "a revision is of a hub id"),
}


@pytest.mark.parametrize("mistake", EARLY)
def test_what_can_be_told_early_is(
    work: Path, tmp_path: Path, mistake: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("reap.app.commands.calibration.rows_of", None)  # no text is read
    options, named = EARLY[mistake]
    assert named in refused(*command(work, tmp_path / "x", *options))
    assert names(tmp_path) == []


@pytest.mark.parametrize("taken", ["x", "x.stats.safetensors", "x.plan.json"])
def test_no_output_is_replaced_unasked(
    work: Path, tmp_path: Path, taken: str, monkeypatch: Any
) -> None:
    """And with --overwrite none of another kind, nor one that is read."""
    monkeypatch.setattr("reap.app.commands.calibration.rows_of", None)
    call = command(work, tmp_path / "x", "--ratio", 0.5)
    if taken == "x":
        shutil.copytree(work / "empty", tmp_path / "x")
        (tmp_path / "x" / "thesis.txt").write_text("mine")
    else:
        (tmp_path / taken).write_text("mine")
    assert f"{taken} exists" in refused(*call)
    assert "will not overwrite" in refused(*call, "--overwrite")
    assert "which is read" in refused("compress", MODEL, MODEL, *call[3:], "--overwrite")


@pytest.mark.parametrize("out", ["", ".", "..", "/"])
def test_no_folder_to_write(work: Path, tmp_path: Path, out: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    call = ("compress", MODEL, out, "--data", work / "a.txt", "--keep", 8)
    assert "exists" in refused(*call) or "which is read" in refused(*call)
    assert "will not overwrite" in (line := refused(*call, "--overwrite")) or "is read" in line


def test_a_model_that_cannot_be_pruned_is_not_calibrated(
    work: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("reap.app.commands.calibration.rows_of", None)
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    quantised = {"quant_method": "some", "ignore": ["model.layers.0.mlp.experts.[25]*"]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    out = tmp_path / "x"
    line = refused("compress", folder, out, *command(work, out, "--ratio", 0.5)[3:])
    assert "can be read in two ways" in line
    assert names(tmp_path) == ["model"]


def test_a_full_disk_is_told_first(work: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("reap.app.commands.calibration.rows_of", None)
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr("reap.checkpoint.guards.shutil.disk_usage", lambda _: usage)
    assert "MB free" in refused(*command(work, tmp_path / "x", "--ratio", 0.5))


def test_after_any_error_the_same_command_goes_on(
    work: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """In the middle of the text, and in pruning: what was measured is kept, nothing else is."""
    monkeypatch.setattr("reap.runs.partial._SHARE", math.inf)
    call = command(work, tmp_path / "x", "--ratio", 0.5)
    check, countdown = batching.check_ids, iter((0, 0, 1))

    def late(model: Any, batch: Any) -> None:
        if next(countdown):
            raise ReapError("late")
        check(model, batch)

    def full(*_: Any, **__: Any) -> NoReturn:
        raise OSError(28, "No space left on device", "somewhere")

    with monkeypatch.context() as patch:
        patch.setattr("reap.runs.calibration.check_ids", late)
        _, line = ended(*call)
    assert "late; what was measured so far, 256 tokens" in line and "same command goes on" in line
    with monkeypatch.context() as patch:
        patch.setattr("reap.checkpoint.pruning.write_shards", full)
        said, line = ended(*call)
    assert "No space left" in line and "512 tokens" in line and len(said) == 2
    assert names(tmp_path) == ["x.stats.safetensors.partial.safetensors"]
    assert run_json(*call)["calibrate"]["tokens"] == 512
    assert names(tmp_path) == ["x", "x.plan.json", "x.stats.safetensors"]
    run_json(*command(work, tmp_path / "whole", "--ratio", 0.5))
    digests = {Statistics.load(path).digest() for path in tmp_path.glob("*.stats.safetensors")}
    assert len(digests) == 1
