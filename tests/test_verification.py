"""A pruned folder is still what was written, or the first difference is named."""

from __future__ import annotations

import shutil
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
    base = Path(shutil.copytree(job / "base", tmp_path / "base"))
    found = verify(base)
    assert found.compared is None and "nothing to compare with" in str(found)
    assert set(found.experts.values()) == {8} and found.expert_parallel == (1, 2, 4, 8)
    with pytest.raises(ReapError, match=r"has no reap\.json"):
        verify(base, job / "base")
    edit_config(base, vocab_size=7)
    assert "lm_head.weight has the wrong shape" in verify(base).problems


def test_top_level_name() -> None:
    assert reap.verify is verify
