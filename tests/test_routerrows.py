"""Cosines of router rows, from the files of every kind of router."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from folders import saved, tensors_of
from merges import a_model
from safetensors.torch import save_file
from torch.nn.functional import cosine_similarity

from reap.errors import ReapError
from reap.merging.routerrows import router_similarity
from reap.model.identity import describe_folder


# A plain matrix, one with a row beyond the experts behind other layers, one beside the block.
@pytest.mark.parametrize("model_type", ["qwen3_moe", "zaya", "gemma4"])
def test_the_rows_of_the_router(model_type: str, tmp_path: Path) -> None:
    saved(tmp_path / "m", model_type)
    info = describe_folder(tmp_path / "m")
    found = router_similarity(tmp_path / "m", info)
    assert list(found) == [layer.name for layer in info.layers]
    assert router_similarity(tmp_path / "m").keys() == found.keys()
    names = {
        "qwen3_moe": "mlp.gate.weight", "zaya": "gate.router_mlp.out_proj.weight",
        "gemma4": "router.proj.weight",
    }  # fmt: skip
    rows = [t for n, t in tensors_of(tmp_path / "m").items() if n.endswith(names[model_type])]
    for matrix, weight in zip(found.values(), rows, strict=True):
        rows8 = weight[:8].double()
        truth = cosine_similarity(rows8[:, None], rows8[None], dim=2)
        torch.testing.assert_close(matrix, truth)


def test_a_row_of_zeros_is_like_none(tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = tensors_of(tmp_path)
    name = next(n for n in tensors if n.endswith("mlp.gate.weight"))
    tensors[name][2] = 0
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    matrix = next(iter(router_similarity(tmp_path).values()))
    assert not matrix[2].any() and not matrix[:, 2].any() and bool(matrix.isfinite().all())


def test_what_cannot_be_read(tmp_path: Path) -> None:
    saved(tmp_path / "m")
    with pytest.raises(ReapError, match="is another model than the statistics'"):
        router_similarity(tmp_path / "m", a_model())
    tensors = tensors_of(tmp_path / "m")
    name = next(n for n in tensors if n.endswith("mlp.gate.weight"))
    quantised = {**tensors, name: tensors[name].to(torch.float8_e4m3fn)}
    save_file(quantised, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ReapError, match="is of F8_E4M3: rows of a quantised router are not read"):
        router_similarity(tmp_path / "m")
    del tensors[name]
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ReapError, match="has no matrix with a row for each of 8 experts"):
        router_similarity(tmp_path / "m")
