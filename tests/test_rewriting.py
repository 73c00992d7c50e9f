"""Merged folders load like the originals and compute what the model merged in memory computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from folders import edit_config, saved, tensors_of
from merges import some_merge
from mtps import saved_with_mtp
from packaging.version import Version
from test_pruning import REPRESENTATIVE
from tiny import model_types, tiny_inputs

from reap.checkpoint.verification import verify
from reap.errors import ReapError
from reap.merging.averaging import average
from reap.merging.mergeplan import Merge
from reap.merging.rewriting import MEANS, check_merge, merge
from reap.merging.tying import merged
from reap.model.identity import describe, describe_folder
from reap.versions import TESTED


def check_same_logits(model: Any, base: Path, out: Path) -> None:
    """Of the merge of `base` in `out`, loaded by stock transformers, and merged in memory: the same
    bits."""
    original = type(model).from_pretrained(base).eval()
    plan = some_merge(describe(original))
    report = merge(base, plan, out)
    assert report.bytes == sum(t.nbytes for t in tensors_of(base).values())
    loaded, found = type(model).from_pretrained(out, output_loading_info=True)
    assert not any(found.values()), found
    inputs = tiny_inputs(model)

    def logits(of: Any) -> torch.Tensor:
        torch.manual_seed(0)  # a diffusion model draws its canvas
        with torch.no_grad():
            return of(**inputs).logits

    with merged(original, plan):
        truth = logits(original)
    assert torch.equal(logits(loaded.eval()), truth)
    assert not torch.equal(logits(original), truth)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "granitemoe", "gemma4"])
def test_loads_and_computes_what_the_merged_model_does(model_type: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "base", model_type, shards=model_type == "qwen3_moe")
    check_same_logits(model, tmp_path / "base", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", model_types())
def test_every_architecture(model_type: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "base", model_type)
    check_same_logits(model, tmp_path / "base", tmp_path / "out")


def test_representative_architectures_are_among_all() -> None:
    if Version(transformers.__version__) < Version(TESTED["transformers"][1]):
        pytest.skip("of the newest release, which has all of them")
    assert set(REPRESENTATIVE) <= set(model_types())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    saved(tmp_path / "base", shards=True)
    return tmp_path / "base"


def test_everything_but_experts_is_copied_byte_for_byte(base: Path, tmp_path: Path) -> None:
    (base / "assets").mkdir()
    (base / "assets" / "a.bin").write_bytes(b"\0\1")
    (base / "README.md").write_text("# the base")
    (base / "config.json").write_text((base / "config.json").read_text() + "\n\n")
    plan = some_merge(describe_folder(base))
    merge(base, plan, tmp_path / "out", command="reap merge")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    means = {
        f"{layer}.{i}.{part}.weight": average(
            [before[f"{layer}.{j}.{part}.weight"] for j in group.experts], group.shares
        )
        for layer, groups in plan.groups.items()
        for group in groups
        for part in ("gate_proj", "up_proj", "down_proj")
        for i in group.experts
        if len(group.experts) > 1
    }
    assert len(means) == 4 * 3 * 8
    for name, tensor in before.items():
        assert torch.equal(after[name], means.get(name, tensor)), name
    for name in ("config.json", "assets/a.bin", "model.safetensors.index.json"):
        old, new = (base / name).read_bytes(), (tmp_path / "out" / name).read_bytes()
        assert old == new or json.loads(old) == json.loads(new)
    assert (base / "config.json").read_bytes() == (tmp_path / "out/config.json").read_bytes()
    assert (tmp_path / "out" / "README.base.md").read_text() == "# the base"
    assert not list(tmp_path.rglob(f"*{MEANS}*"))


def test_record_and_card_say_what_was_done(base: Path, tmp_path: Path) -> None:
    plan = some_merge(describe_folder(base))
    report = merge(base, plan, tmp_path / "out", command="reap merge x")
    record = json.loads((tmp_path / "out" / "reap.json").read_text())
    assert record["format"] == "reap-merged" and record["command"] == "reap merge x"
    again = Merge.from_json(
        json.dumps(
            {
                "format": "reap-merge", "version": 1, "model": record["base_model"],
                "method": record["method"], "options": {}, "calibration": {},
                "layers": {name: of["groups"] for name, of in record["layers"].items()},
            }
        )
    )  # fmt: skip
    assert again.groups == plan.groups
    card = (tmp_path / "out" / "README.md").read_text()
    assert "32 -> 12 over 4 layers" in card and "**as large as the\noriginal**" in card
    assert "as large as the original" in str(report) and report.left == plan.left
    assert json.loads(json.dumps(report.to_json()))["merged_bytes"] == report.merged_bytes


def test_verify_holds_it_against_the_checksums(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(base, some_merge(describe_folder(base)), out)
    found = verify(out)
    assert found.compared == "the checksums in reap.json" and not found.problems
    assert set(found.experts.values()) == {8}
    with pytest.raises(ReapError, match="was merged: its experts are means"):
        verify(out, base)
    shard = next(out.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ReapError, match="its checksum differs"):
        verify(out)


def test_progress_adds_up_to_what_was_announced(base: Path, tmp_path: Path) -> None:
    plan, heard = some_merge(describe_folder(base)), list[int]()
    size = check_merge(base, plan, tmp_path / "out")
    report = merge(base, plan, tmp_path / "out", progress=heard.append, verify=False)
    assert sum(heard) == size and report.verify_seconds is None
    assert "not verified" in str(report)


def test_an_existing_folder(base: Path, tmp_path: Path) -> None:
    plan = some_merge(describe_folder(base))
    merge(base, plan, tmp_path / "out")
    with pytest.raises(ReapError, match="exists: choose another folder"):
        merge(base, plan, tmp_path / "out")
    other = some_merge(describe_folder(base), groups=2)
    merge(base, other, tmp_path / "out", overwrite=True)  # a folder of ours
    record = json.loads((tmp_path / "out" / "reap.json").read_text())
    assert len(next(iter(record["layers"].values()))["groups"]) == 2


def test_a_merge_of_another_model_and_one_of_nothing(base: Path, tmp_path: Path) -> None:
    saved(tmp_path / "other", num_experts=6)
    with pytest.raises(ReapError, match="merge was made for another model than .*num_experts 6"):
        merge(base, some_merge(describe_folder(tmp_path / "other")), tmp_path / "out")
    with pytest.raises(ReapError, match="the merge joins no experts: .* would be a copy"):
        merge(base, some_merge(describe_folder(base), groups=8), tmp_path / "out")
    edit_config(base, rope_theta=5.0)
    assert not (tmp_path / "out").exists()


def test_another_precision_is_noted_or_refused(base: Path, tmp_path: Path) -> None:
    plan = some_merge(describe_folder(base))
    saved(tmp_path / "half", dtype=torch.bfloat16)
    report = merge(tmp_path / "half", plan, tmp_path / "out")
    assert "another precision" in report.notes[0]
    with pytest.raises(ReapError, match="is not strictly what the merge was made from"):
        merge(tmp_path / "half", plan, tmp_path / "strict", strict=True)


def test_a_full_disk_is_said_before_anything_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ReapError, match="needs .* but .* has 1.05 MB free"):
        merge(base, some_merge(describe_folder(base)), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_layer_of_multi_token_prediction(tmp_path: Path) -> None:
    """It is merged where the merge speaks of it, and left alone where not."""
    made = saved_with_mtp(tmp_path / "base", "glm4_moe")
    for mtp in (True, False):
        plan = some_merge(describe_folder(tmp_path / "base", mtp=mtp))
        out = tmp_path / f"out{mtp}"
        merge(tmp_path / "base", plan, out)
        before, after = tensors_of(tmp_path / "base"), tensors_of(out)
        inside = [name for name in before if name.startswith(made.names.experts)]
        assert inside
        changed = any(not torch.equal(before[name], after[name]) for name in inside)
        assert changed == mtp
