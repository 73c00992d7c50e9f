"""A pruned folder is still what was written, or the first difference is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from folders import edit_config, saved, some_plan

import reap
from reap.checkpoint.pruning import prune
from reap.checkpoint.verification import verify
from reap.errors import ReapError


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("job")
    saved(root / "base", num_hidden_layers=2, shards=True)
    (root / "base" / "tokenizer.json").write_text("{}")
    prune(root / "base", some_plan(root / "base"), root / "out")
    return root


@pytest.fixture
def out(job: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(job / "out", tmp_path / "out"))


def test_what_was_written(job: Path, out: Path) -> None:
    seen: list[int] = []
    found = verify(out, progress=seen.append)
    assert found.compared == "the checksums in reap.json" and found.problems == ()
    assert found.bytes == sum(seen)
    assert found.bytes == sum(p.stat().st_size for p in out.iterdir() if p.name != "reap.json")
    assert set(found.experts.values()) == {5} and found.expert_parallel == (1, 5)
    assert "experts per layer: 5 in 2 layers" in str(found)
    again = verify(out, job / "base")
    assert again.compared == str(job / "base") and "the same as" in str(again)
    assert again.bytes == sum(p.stat().st_size for p in out.glob("*.safetensors"))


@pytest.mark.parametrize("against_source", [False, True])
def test_a_bit_that_flipped(job: Path, out: Path, against_source: bool) -> None:
    shard = sorted(out.glob("*.safetensors"))[-1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-2] + bytes([data[-2] ^ 4]) + data[-1:])
    with pytest.raises(ReapError, match=f"{shard.name} (is not what was written|differs)"):
        verify(out, job / "base" if against_source else None)


def test_files_that_are_missing_short_or_edited(out: Path) -> None:
    (out / "tokenizer.json").write_text("{ }")
    with pytest.raises(ReapError, match="tokenizer.json has 3 bytes, 2 were written"):
        verify(out)
    (out / "tokenizer.json").unlink()
    with pytest.raises(ReapError, match="lacks tokenizer.json"):
        verify(out)


def test_another_source(job: Path, out: Path, tmp_path: Path) -> None:
    saved(tmp_path / "other", num_hidden_layers=2, shards=True, seed=1)
    with pytest.raises(ReapError, match="other is not the model that .* holds other values"):
        verify(out, tmp_path / "other")
    with pytest.raises(ReapError, match="is not the model that .* num_experts 8 against"):
        verify(out, out)


def test_a_model_that_was_not_pruned(job: Path, tmp_path: Path) -> None:
    for source in (None, job / "base"):
        with pytest.raises(
            ReapError, match=r"base has no reap\.json: it was not pruned .*`reap info`"
        ):
            verify(job / "base", source)


def test_a_record_without_files(out: Path) -> None:
    """Of the sizes alone there is nothing to compare; what a server has to know is still said."""
    record = json.loads((out / "reap.json").read_text())
    del record["files"]
    (out / "reap.json").write_text(json.dumps(record))
    found = verify(out)
    assert found.compared is None and "nothing to compare with" in str(found)
    edit_config(out, vocab_size=7)
    assert "lm_head.weight has the wrong shape" in verify(out).problems


def test_one_is_no_plural(out: Path) -> None:
    alone = replace(verify(out), expert_parallel=(1,), ignored=("x is not part of it",))
    assert "expert parallel: 1 rank shares evenly" in str(alone)
    assert "not loaded: 1 tensor, x is not part of it" in str(alone)


def test_top_level_name() -> None:
    assert reap.verify is verify
