"""Headers from strangers are refused in one line, and good ones read as the library reads them."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from reap.errors import ReapError
from reap.files.folder import open_folder
from reap.files.safefile import copy_range, encode_header, merged, parse_json, read_header


def written(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start: Any, stop: Any, shape: Any = (4,), dtype: Any = "U8") -> dict[str, Any]:
    shape = list(shape) if isinstance(shape, tuple) else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HOSTILE = {
    "empty file": (b"", b"", None, "truncated|has only"),
    "huge length": (b"{}", b"", 2**63, "not a safetensors file"),
    "longer than the file": (b"{}", b"", 900, "truncated"),
    "no JSON": (b"{nope", b"", None, "not valid JSON"),
    "no UTF-8": (b'{"\xff":1}', b"", None, "not valid JSON"),
    "no object": (b"[]", b"", None, "must be an object"),
    "nested": (b"[" * 100_000, b"", None, "nested too deeply"),
    "long number": (b'{"a":' + b"9" * 10_000 + b"}", b"", None, "not valid JSON"),
    "twice": (b'{"a":1,"a":2}', b"", None, "twice"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", None, "__metadata__"),
    "no entry": ({"a": 1}, b"", None, "exactly dtype"),
    "extra field": ({"a": {**entry(0, 4), "x": 1}}, bytes(4), None, "exactly dtype"),
    "dtype": ({"a": entry(0, 4, dtype="F7")}, bytes(4), None, "unknown dtype"),
    "dtype list": ({"a": entry(0, 4, dtype=[])}, bytes(4), None, "unknown dtype"),
    "negative size": ({"a": entry(0, 4, (-4,))}, bytes(4), None, "not a list of sizes"),
    "bool size": ({"a": entry(0, 1, [True])}, bytes(1), None, "not a list of sizes"),
    "float offset": ({"a": entry(0.0, 4)}, bytes(4), None, "non-negative integers"),
    "negative offset": ({"a": entry(-4, 0)}, bytes(4), None, "non-negative integers"),
    "backwards": ({"a": entry(4, 0)}, bytes(4), None, "has -4 bytes"),
    "overflow": ({"a": entry(0, 4, (2**62, 2**62, 16))}, bytes(4), None, "ask for"),
    "offset overflow": ({"a": entry(2**63, 2**63 + 4)}, bytes(4), None, "non-negative integers"),
    "wrong span": ({"a": entry(0, 4, (5,))}, bytes(4), None, "ask for 5"),
    "half bytes": ({"a": entry(0, 1, (1,), "F4")}, bytes(1), None, "ask for 0.5"),
    "overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6), None, "overlaps"),
    "gap": ({"a": entry(0, 4), "b": entry(5, 9)}, bytes(9), None, "gap"),
    "truncated": ({"a": entry(0, 4)}, bytes(3), None, "truncated"),
    "trailing": ({"a": entry(0, 4)}, bytes(5), None, "after its last tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(case: str, tmp_path: Path) -> None:
    header, data, length, match = HOSTILE[case]
    path = written(tmp_path / "x.safetensors", header, data, length)
    if case == "empty file":
        path.write_bytes(b"")
    with pytest.raises(ReapError, match=match) as caught:
        read_header(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        "bf16": torch.ones(3, 5, dtype=torch.bfloat16),
        "fp8": torch.ones(7).to(torch.float8_e4m3fn),
        "none": torch.ones(0, 4), "scalar": torch.tensor(1.5), "bool": torch.tensor([True]),
        "i64": torch.arange(3),
    }  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.metadata == {"format": "pt"}
    assert {n: t.shape for n, t in header.tensors.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    assert sum(t.nbytes for t in header.tensors.values()) == sum(t.nbytes for t in tensors.values())


def test_a_header_that_is_held_is_not_read_again(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", {"a": entry(0, 4)}, bytes(4))
    held = read_header(path)
    assert read_header(path) is held
    written(path, {"b": entry(0, 5, (5,))}, bytes(5))
    assert set(read_header(path).tensors) == {"b"}, "the file is another one now"
    (tmp_path / "c.safetensors").symlink_to(path)
    assert read_header(tmp_path / "c.safetensors").path.name == "c.safetensors"
    del held
    path.unlink()
    with pytest.raises(ReapError, match="cannot read"):
        read_header(path)


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    data = torch.arange(6, dtype=torch.float32)
    head = encode_header({"ä": ("F32", (2, 3)), "b": ("U8", (0,))}, {"format": "pt"})
    assert len(head) % 8 == 0
    path.write_bytes(head + data.numpy().tobytes())
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("ä"), data.reshape(2, 3)) and file.metadata() == {
            "format": "pt"
        }


def test_merged_joins_neighbours_only() -> None:
    ranges = [(0, 4), (4, 4), (10, 2), (12, 0), (12, 1), (0, 4)]
    assert list(merged(iter(ranges))) == [(0, 8), (10, 3), (0, 4)]


def test_copies_where_the_kernel_pretends_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems answer a copy inside the kernel with "0 bytes" instead of an error."""
    monkeypatch.setattr(os, "copy_file_range", lambda *_, **__: 0)
    (tmp_path / "a").write_bytes(b"0123456789")
    with open(tmp_path / "a", "rb") as source, open(tmp_path / "b", "wb") as target:
        copy_range(source.fileno(), 2, 5, target.fileno(), lambda n: None)
        with pytest.raises(ReapError, match="became shorter"):
            copy_range(source.fileno(), 8, 5, target.fileno(), lambda n: None)
    assert (tmp_path / "b").read_bytes() == b"2345689"


def test_duplicate_keys_anywhere() -> None:
    with pytest.raises(ReapError, match="'b' twice"):
        parse_json(b'{"a": {"b": 1, "b": 2}}', "it")


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "a\\x.safetensors", "x.bin", "",
     ".x.safetensors", "x\0.safetensors", 3, None],
)  # fmt: skip
def test_index_names_stay_in_the_folder(shard: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ReapError, match="not the name of a file in the folder"):
        open_folder(folder)


@pytest.mark.parametrize(
    "index",
    [{}, {"weight_map": []}, {"weight_map": {}}, [], {"weight_map": {"a": "b.safetensors"}}],
)
def test_broken_indexes(index: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ReapError, match="weight_map|must be an object|not there"):
        open_folder(tmp_path)


def test_index_metadata_must_be_an_object(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"a": "b.safetensors"}, "metadata": [1]}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ReapError, match="its metadata must be a JSON object"):
        open_folder(tmp_path)


def test_index_and_shard_must_agree(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"b": torch.ones(1)}, tmp_path / "s.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "s.safetensors"}}')
    with pytest.raises(ReapError, match="does not hold 'a'"):
        open_folder(tmp_path)
