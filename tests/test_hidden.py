"""Hidden states go to the file and come back; the disk is asked before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from reap.errors import ReapError
from reap.runs.hidden import HiddenFile


def test_away_and_back(tmp_path: Path) -> None:
    file = HiddenFile(tmp_path, 1000)
    assert not list(tmp_path.iterdir())  # it has no name that could be left behind
    with torch.inference_mode():
        tensors = [torch.randn(3, 5, 7) for _ in range(2)]
        before = [tensor.clone() for tensor in tensors]
        views = [tensor[1:] for tensor in tensors]
        places = [file.place(420) for _ in tensors]
        assert file.place(420) is None
        with places[0].holds(views[0]), places[1].holds(views[1]):  # type: ignore[union-attr]
            assert not any(tensor.untyped_storage().nbytes() for tensor in tensors)
        for tensor, view, was in zip(tensors, views, before, strict=True):
            assert torch.equal(tensor, was) and torch.equal(view, was[1:])
    file.clear()
    assert file.place(1000) is not None
    file.close()


@pytest.mark.parametrize("size", [100, 420])
def test_what_cannot_go_stays(tmp_path: Path, size: int) -> None:
    """It is too large, or another library's memory."""
    tensor = torch.zeros(3, 5, 7)
    if size == 420:
        tensor.numpy()
    place = HiddenFile(tmp_path, size).place(size)
    assert place is not None
    with place.holds(tensor):
        assert tensor.untyped_storage().nbytes() == 420


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    size = 1 << 55
    with pytest.raises(
        ReapError, match=r"has no room for .* GB of hidden states \(.*--wave-tokens"
    ):
        HiddenFile(tmp_path, size)
    assert not os.listdir(tmp_path)
