"""Tensors are read as the library reads them, and a file that changes is an error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reap.errors import ReapError
from reap.files.safefile import read_header
from reap.model import stored
from reap.model.stored import Stored

TENSORS = {
    "odd": torch.arange(7, dtype=torch.uint8),
    "large": torch.randn(3, 700, 200),
    "half": torch.randn(3, 5).bfloat16(),
    "eighth": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(2.5),
    "none": torch.zeros(0, 3),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_the_same_as_the_library(path: Path) -> None:
    found = Stored([read_header(path)]).read(TENSORS)
    for name, tensor in load_file(path).items():
        assert found[name].get_shape() == list(tensor.shape)
        read = found[name][...]
        assert read.dtype == tensor.dtype and torch.equal(read.float(), tensor.float())
        with pytest.raises(AssertionError):  # and then it is forgotten
            found[name][...]


@pytest.mark.parametrize("change", ["gone", "shorter", "written", "replaced"])
def test_a_file_that_is_another(path: Path, change: str) -> None:
    tensors = Stored([read_header(path)])
    if change == "gone":
        path.unlink()
    elif change == "shorter":
        os.truncate(path, 5000)
    elif change == "written":
        with path.open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"x")
        os.utime(path, ns=(1, 1))
    else:
        other = path.with_name("other")
        save_file(TENSORS, other)
        other.rename(path)
    with pytest.raises(ReapError, match="cannot read .*a.safetensors|a.safetensors changed while"):
        tensors.read(["half"])


def test_a_file_that_ends_while_it_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.preadv, list[int]()

    def cut(fd: int, into: list[memoryview], offset: int) -> int:
        if calls:
            os.truncate(path, 5000)
        calls.append(fd)
        return real(fd, into, offset)

    monkeypatch.setattr(stored, "CHUNK", 4096)
    monkeypatch.setattr(os, "preadv", cut)
    with pytest.raises(ReapError, match="a.safetensors (became shorter|changed) while it was read"):
        Stored([read_header(path)]).read(["large"])
