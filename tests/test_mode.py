"""In memory or layer by layer: by what is asked for, and by what fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import edit_config, saved
from safetensors.torch import save_file

from reap.errors import ReapError
from reap.runs import memory, mode


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved(tmp_path)
    tensors = {"a": torch.zeros(1000), "b": torch.zeros(100, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def why(folder: Path, monkeypatch: Any, free: int = 1 << 40, **options: Any) -> str | None:
    monkeypatch.setattr(memory, "resident", lambda: 1000)
    monkeypatch.setattr(memory, "allowed", lambda: 1000 + free)
    given: dict[str, Any] = {"asked": None, "dtype": "auto", "device": "cpu", "limit": None}
    return mode.why_streamed(folder=folder, **(given | options))


@pytest.mark.parametrize(("free", "fits"), [(4510, True), (4509, False)])
def test_what_does_not_fit(folder: Path, monkeypatch: Any, free: int, fits: bool) -> None:
    found = why(folder, monkeypatch, free)
    assert found == (None if fits else "whole it takes 5.51 kB of memory, of 5.51 kB")
    if fits:
        assert why(folder, monkeypatch, free, asked=False) is None
    else:
        with pytest.raises(ReapError, match="takes 5.51 kB of memory whole, .* leave out --no-str"):
            why(folder, monkeypatch, free, asked=False)
    assert why(folder, monkeypatch, asked=True) == "as asked for"


def test_a_limit_counts_mapped_files(folder: Path, monkeypatch: Any) -> None:
    assert why(folder, monkeypatch, limit=1000 + 4510 + 4100) is None
    assert why(folder, monkeypatch, limit=1000 + 4510 + 4099) is not None


def test_in_another_dtype(folder: Path, monkeypatch: Any) -> None:
    assert why(folder, monkeypatch, 2310, dtype="bfloat16") is None
    assert why(folder, monkeypatch, 2309, dtype="bfloat16") is not None


def test_packed_weights_grow(folder: Path, monkeypatch: Any) -> None:
    """To 16 bits, or to what was asked for: [2, 32, 3] of 96 bytes and exponents here."""
    blocks = torch.zeros(2, 3, 1, 16, dtype=torch.uint8)
    tensors = {"a": torch.zeros(1000), "b_blocks": blocks, "b_scales": blocks[..., 0].contiguous()}
    save_file(tensors, folder / "model.safetensors")
    edit_config(folder, quantization_config={"quant_method": "mxfp4"})
    for dtype, bytes_ in (("auto", 4000 + 192 * 2), ("float32", 4000 + 192 * 4)):
        need = round(bytes_ * mode.LOADING)
        assert why(folder, monkeypatch, need, dtype=dtype) is None
        assert why(folder, monkeypatch, need - 1, dtype=dtype) is not None


@pytest.mark.parametrize(("free", "fits"), [(4510, True), (4509, False)])
def test_a_gpu(folder: Path, monkeypatch: Any, free: int, fits: bool) -> None:
    """Of its memory alone."""
    monkeypatch.setattr(
        mode, "find_device", lambda device: "cuda:1" if device == "auto" else device
    )
    monkeypatch.setattr(memory.Device, "allowed", lambda self: free)
    said = "its weights take 4.10 kB, and cuda:1 has room for 4.51 kB"
    assert why(folder, monkeypatch, 0, device="auto") == (None if fits else said)
    assert why(folder, monkeypatch, device="cuda", asked=True) == "as asked for"
    if not fits:
        with pytest.raises(ReapError, match="has room for 4.51 kB: leave out --no-stream"):
            why(folder, monkeypatch, device="cuda", asked=False)


def test_devices_that_do_not_run_layer_by_layer(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(mode, "find_device", lambda device: device)
    for device in ("balanced", "mps", "xpu:0"):
        assert why(folder, monkeypatch, 0, device=device) is None
        with pytest.raises(ReapError, match=f"or on one CUDA GPU, not on {device}: --device cpu"):
            why(folder, monkeypatch, device=device, asked=True)


@pytest.mark.parametrize(("count", "free"), [(1, 4510), (2, 9020)])
def test_what_must_be_loaded_whole_is_refused_before(
    folder: Path, monkeypatch: Any, count: int, free: int
) -> None:
    monkeypatch.setattr(memory, "resident", lambda: 1000)
    both = (folder,) * count
    monkeypatch.setattr(memory, "allowed", lambda: 1000 + free)
    mode.check_fits(*both, dtype="auto", device="cpu")
    monkeypatch.setattr(memory, "allowed", lambda: 1000 + free - 1)
    with pytest.raises(ReapError, match=r"takes? .* of memory, of .* that are free: use a machine"):
        mode.check_fits(*both, dtype="auto", device="cpu")
    mode.check_fits(*both, dtype="bfloat16", device="cpu")
