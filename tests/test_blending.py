"""What becomes of tensors is told from names and shapes, and means are written once, exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from folders import add_tensors, saved, tensors_of
from merges import some_merge
from safetensors.torch import save_file

from reap.checkpoint.operation import own_tensors
from reap.errors import ReapError
from reap.files.folder import open_folder
from reap.merging import blending
from reap.merging.averaging import average
from reap.merging.blending import Piece, blending_of, edits_of, write_means
from reap.merging.mergeplan import Group, Merge
from reap.model.identity import describe_folder
from reap.model.info import LayerInfo, ModelInfo


def model_of(*names: str, experts: int = 3) -> ModelInfo:
    return ModelInfo("any", "m", "f", None, tuple(LayerInfo(n, experts, 2) for n in names))


def merge_of(*names: str) -> Merge:
    """Experts 0 and 2 become one, by 1 to 3."""
    groups = (Group((0, 2), (1, 3)), Group((1,), (5,)))
    return Merge(model_of(*names), "by hand", dict.fromkeys(names, groups))


def folder_of(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    return folder


def made(folder: Path, merge: Merge) -> dict[str, bytes]:
    """The new bytes of every tensor that changes."""
    opened = open_folder(folder)
    found = blending_of(opened, merge)
    heard: list[int] = []
    write_means(found, folder / "means", heard.append)
    assert sum(heard) == found.size == (folder / "means").stat().st_size
    stored = {n: t for shard in opened.shards for n, t in own_tensors(opened, shard)}
    return {
        name: b"".join(edit.made()) if edit.made else b""
        for name, edit in edits_of(found, stored, folder / "means").items()
    }


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("chunk", [8, 1 << 22])
def test_single_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(blending, "CHUNK", chunk)
    w = [torch.randn(5, 4).bfloat16() for _ in range(3)]
    b = [torch.randn(5) for _ in range(3)]
    experts = {f"layers__0__mlp__experts__{i}__up__weight": w[i] for i in range(3)}
    biases = {f"layers__0__mlp__experts__{i}__up__bias": b[i] for i in range(3)}
    folder_of(tmp_path, **experts, **biases, layers__0__mlp__gate__weight=torch.randn(3, 4))
    found = made(tmp_path, merge_of("layers.0.mlp.experts"))
    mean_w, mean_b = (average([x[0], x[2]], (0.25, 0.75)) for x in (w, b))
    name = "layers.0.mlp.experts.{}.up.{}"
    assert found == {
        name.format(i, kind): raw(mean)
        for i in (0, 2)
        for kind, mean in (("weight", mean_w), ("bias", mean_b))
    }


def test_fused_and_stacked_experts_and_what_they_share(tmp_path: Path) -> None:
    fused, stacked = torch.randn(3, 4, 2), torch.randn(6, 4).half()
    folder_of(
        tmp_path,
        layers__0__mlp__experts__gate_up_proj=fused,
        layers__0__mlp__experts__mlp__w1=stacked,
        layers__0__mlp__experts__e_score_correction_bias=torch.randn(3),
        layers__0__mlp__experts__post_expert_norm__weight=torch.randn(3),
        layers__0__mlp__experts__scale=torch.randn(1),
    )
    found = made(tmp_path, merge_of("layers.0.mlp.experts"))
    mean = average([fused[0], fused[2]], (0.25, 0.75))
    half = average([stacked[:2], stacked[4:]], (0.25, 0.75))
    assert found == {
        "layers.0.mlp.experts.gate_up_proj": raw(torch.stack([mean, fused[1], mean])),
        "layers.0.mlp.experts.mlp.w1": raw(torch.cat([half, stacked[2:4], half])),
    }


def test_text_and_vision_experts_in_one_numbering(tmp_path: Path) -> None:
    """The merge speaks of the text's; those of vision, numbered after them, stay."""
    experts = {f"layers__0__mlp__experts__{i}__up__weight": torch.randn(2, 2) for i in range(6)}
    routers = {"gate__weight": torch.randn(4, 3), "gate__weight_1": torch.randn(4, 3)}
    folder_of(tmp_path, **experts, **{f"layers__0__mlp__{n}": t for n, t in routers.items()})
    text, vision = "layers.0.mlp.text_moe.experts", "layers.0.mlp.vision_moe.experts"
    name = "layers.0.mlp.experts.{}.up.weight"
    assert sorted(made(tmp_path, merge_of(text))) == [name.format(i) for i in (0, 2)]
    (tmp_path / "means").unlink()
    assert sorted(made(tmp_path, merge_of(vision))) == [name.format(i) for i in (3, 5)]
    (tmp_path / "means").unlink()
    assert len(made(tmp_path, merge_of(text, vision))) == 4


def test_layers_that_share_their_weights(tmp_path: Path) -> None:
    w = torch.randn(3, 2, 2)
    folder_of(tmp_path, decoder__layers__0__mlp__experts__gate_up_proj=w)
    names = "decoder.layers.0.mlp.experts", "encoder.layers.0.mlp.experts"
    assert len(made(tmp_path, merge_of(*names))) == 1
    other = (Group((0, 1), (1, 3)), Group((2,), (5,)))
    apart = Merge(model_of(*names), "m", {**merge_of(*names).groups, names[1]: other})
    with pytest.raises(ReapError, match="share their weights: the merge must group their experts"):
        blending_of(open_folder(tmp_path), apart)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {f"experts__{i}__up__weight": torch.zeros(2 + i, 2) for i in range(3)},
            r"F32 \[4, 2\] and .*experts.0.up.weight' F32 \[2, 2\]: experts that differ",
        ),
        (
            {f"experts__{i}__up__weight": torch.zeros(2, 2).to((torch.half, torch.float)[i > 0])
             for i in range(3)},
            "F32 .* and .* F16 .*: experts that differ",
        ),
        (
            {f"experts__{i}__w{i}__weight": torch.zeros(2, 2) for i in range(3)},
            "expert 2 has nothing like 'layers.0.mlp.experts.0.w0.weight'",
        ),
        (
            {f"experts__{i}__up__weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)
             for i in range(3)},
            "is of F8_E4M3: quantised weights have no mean, give a checkpoint in BF16",
        ),
        ({"experts__up_blocks": torch.zeros(3, 2, dtype=torch.uint8)}, "is of U8: quantised"),
        ({"experts__up": torch.zeros(4, 2)}, "axis 0 must have one entry for each of 3 experts"),
        (
            {f"experts__{i}__up__weight": torch.zeros(2, 2) for i in range(2)},
            "has 2 experts, the merge speaks of 3",
        ),
        ({"up__weight": torch.zeros(2, 2)}, "has no experts that could be merged"),
    ],
)  # fmt: skip
def test_what_has_no_mean(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    folder_of(tmp_path, **{f"layers__0__mlp__{name}": t for name, t in tensors.items()})
    with pytest.raises(ReapError, match=message):
        blending_of(open_folder(tmp_path), merge_of("layers.0.mlp.experts"))


def test_a_file_that_changes_or_is_cut_short(tmp_path: Path) -> None:
    saved(tmp_path)
    found = blending_of(open_folder(tmp_path), some_merge(describe_folder(tmp_path)))
    add_tensors(tmp_path, more=torch.zeros(1))
    with pytest.raises(ReapError, match="changed while it was read"):
        write_means(found, tmp_path / "means", lambda n: None)
    whole = (tmp_path / "means").stat().st_size
    with pytest.raises(ReapError, match="became shorter"):
        list(blending._read([Piece(tmp_path / "means", None, 0, whole + 1)]))


def test_a_disk_that_holds_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    found = blending_of(open_folder(tmp_path), some_merge(describe_folder(tmp_path)))
    own = blending._read

    def wrong(pieces: list[Piece]):
        for data in own(pieces):
            flips = pieces[0].path.name == "means"
            yield bytes([data[0] ^ flips]) + data[1:]

    monkeypatch.setattr(blending, "_read", wrong)
    with pytest.raises(ReapError, match="verification failed: .*means does not hold"):
        write_means(found, tmp_path / "means", lambda n: None)
    assert tensors_of(tmp_path)
