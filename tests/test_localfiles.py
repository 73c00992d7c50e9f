"""Files of rows: arrays, compression, parquet, and what is damaged in them."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from test_batching import TOKENIZER, all_text

from reap.errors import ReapError
from reap.text.batching import batches, parse_spec

ROWS = [{"text": "one", "more": "1"}, {"text": "two", "more": "2"}]
LINES = "\n".join(map(json.dumps, ROWS)).encode()
ARRAY = json.dumps(ROWS, indent=1).encode()


def read(path: Path, column: str = "", **options: Any) -> list[str]:
    spec = f"{path}:{column}" if column else str(path)
    return all_text([spec], TOKENIZER, packing=False, **options)


@pytest.mark.parametrize("content", [LINES, ARRAY, b"\xef\xbb\xbf\n " + ARRAY, b"\n" + LINES])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.json.gz", "a.jsonl.gz", "A.JSONL.GZ"])
def test_lines_and_arrays(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(content, mtime=0) if name.lower().endswith("gz") else content)
    assert read(path) == ["one", "two"]
    assert read(path, "more") == ["1", "2"]
    assert parse_spec(str(path)).domain == name[0]


def test_compressed_text_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"prose", mtime=0))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES, mtime=0))
    (tmp_path / "c.bin.gz").write_bytes(b"not read")
    assert sorted(read(tmp_path)) == ["one", "prose", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a"},]', "a.json, line 1: not JSON .*is one array"),
        ("a.json", b'[{"text": "a"}, 5]', "a.json, row 2: needs"),
        ("a.json", b'{\n"data": []}', "a.json, line 1: not JSON .*one object"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: cannot be read"),
        ("a.jsonl.gz", gzip.compress(LINES * 99, mtime=0)[:-9], "a.jsonl.gz: cannot be read"),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ReapError, match=message):
        read(tmp_path / name)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", gzip.compress(LINES, mtime=0), r"what files called \*.gz hold"),
        ("a.txt", b"\x28\xb5\x2f\xfd rest", r"what files called \*.zst hold"),
        ("a.json", b"PAR1 rest", r"what files called \*.parquet hold"),
        ("a.jsonl", LFS, "is a Git LFS pointer"),
        ("a.txt", LFS, "is a Git LFS pointer"),
        ("a.txt", "text".encode("utf-16"), "is UTF-16: convert"),
        ("a.csv", LINES.decode().encode("utf-16"), "is UTF-16: convert"),
    ],
)
def test_what_is_not_what_its_name_says(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ReapError, match=f"{name} .*{message}"):
        read(tmp_path / name)


def test_tables(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbftext,more\r\n"o,\nne",1\r\ntwo,2\r\n')
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress(b"instruction\toutput\na\tb\n", mtime=0))
    assert read(tmp_path / "a.csv") == ["o,\nne", "two"]
    assert read(tmp_path / "a.csv", "more") == ["1", "2"]
    assert read(tmp_path / "b.tsv.gz") == ["a\n\nb"]
    for content, message in {
        b"text,more\none\n": "line 2: has not as many fields",
        b"text\none,two\n": "line 2: has not as many fields",
        b'text\n"one': "line 1: unexpected end",
        b"other\none\n": "line 2: needs .* it has other",
    }.items():
        (tmp_path / "c.csv").write_bytes(content)
        with pytest.raises(ReapError, match=f"c.csv, {message}"):
            read(tmp_path / "c.csv")
    (tmp_path / "c.csv").write_bytes(b"text\n\xff\n")
    with pytest.raises(ReapError, match="c.csv: is not UTF-8"):
        read(tmp_path / "c.csv")


def test_the_rest_of_a_damaged_file_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("whole")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES + b"\n" + b"x" * 99, mtime=0)[:-4])
    rows = batches(str(tmp_path), TOKENIZER, packing=False, skip_bad=True)
    assert sum(batch.tokens for batch in rows) >= 5
    assert "b.jsonl.gz" in rows.notes()[0]


def test_a_text_file_has_no_columns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ReapError, match="a.txt: has no columns, so there is no 'body'"):
        read(tmp_path / "a.txt", "body")


@pytest.mark.parametrize(
    ("name", "package"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")]
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: Any, name: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.parquet", None)
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(ReapError, match=f"{name}: needs the `{package}` .*pip install {package}$"):
        batches(str(tmp_path / name), TOKENIZER)


def test_zst(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.compress(LINES)
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    assert read(tmp_path / "a.jsonl.zst", "more") == ["1", "2"]
    (tmp_path / "b.jsonl.zst").write_bytes(b"nonsense")
    with pytest.raises(ReapError, match="b.jsonl.zst: cannot be read"):
        read(tmp_path / "b.jsonl.zst")


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    turns = [{"from": "human", "value": "hi"}]
    table = pyarrow.Table.from_pylist([{**row, "conversations": turns} for row in ROWS])
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["one", "two"]
    assert read(tmp_path / "a.parquet", "more") == ["1", "2"]
    (tmp_path / "b.parquet").write_bytes(b"nonsense")
    with pytest.raises(ReapError, match="b.parquet: cannot be read"):
        read(tmp_path / "b.parquet")
