"""Files that are not what was asked for are called what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import plan_for, saved
from safetensors.torch import save_file
from slots import MODEL

from reap.errors import ReapError
from reap.files.folder import open_folder
from reap.files.kinds import kind_of
from reap.files.safefile import read_header, read_json
from reap.model.config import read_config
from reap.model.load import load_tokenizer
from reap.planning.plan import Plan
from reap.statistics.stats import Statistics

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 4997\n".format("0" * 64)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    Statistics(MODEL).save(tmp_path / "statistics")
    plan_for("model.layers.0.mlp.experts").save(tmp_path / "plan")
    save_file({"a": torch.ones(1)}, tmp_path / "weights")
    (tmp_path / "config").write_text('{"model_type": "qwen3_moe"}')
    (tmp_path / "record").write_text('{"format": "reap-pruned"}')
    (tmp_path / "text").write_text("text")
    (tmp_path / "pointer").write_text(POINTER)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "kind", "hint"),
    [
        ("statistics", "statistics", "make one of it with `reap plan`"),
        ("weights", "weights of a model", "give the file that `reap plan` wrote"),
        ("config", "a model's config", "give the file"),
        ("record", "the record of a pruned model", "give the file"),
        (".", "a folder", "give the file"),
    ],
)
def test_what_is_no_plan(name: str, kind: str, hint: str, files: Path) -> None:
    assert kind_of(files / name) == kind
    with pytest.raises(ReapError, match=f"is {kind}, not a plan: {hint}"):
        Plan.load(files / name)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("plan", "a plan"),
        ("config", "a model's config"),
        (".", "a folder"),
    ],
)
def test_what_holds_no_statistics(name: str, kind: str, files: Path) -> None:
    with pytest.raises(ReapError, match=f"is {kind}, it holds no statistics: give a file that"):
        Statistics.load(files / name)


def test_pointers_in_place_of_files(files: Path) -> None:
    for read in (read_header, read_json, Plan.load, Statistics.load):
        with pytest.raises(ReapError, match="pointer is a Git LFS pointer, not .*git lfs pull"):
            read(files / "pointer")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_pointers_in_a_model_folder(name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / name).write_text(POINTER)
    own: dict[str, Any] = {"config.json": read_config, "tokenizer.json": load_tokenizer}
    reads: list[Any] = [open_folder, *([own[name]] if name in own else [])]
    for read in reads:
        with pytest.raises(ReapError, match=f"{name} is a Git LFS pointer"):
            read(tmp_path)


def test_what_is_not_known(files: Path) -> None:
    assert kind_of(files / "missing") is None is kind_of(files / "text")
