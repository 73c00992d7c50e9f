"""Local files of text and of rows, compressed or not, read a piece at a time."""

from __future__ import annotations

import codecs
import csv
import gzip
import importlib
import io
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from reap.errors import ReapError, first_line
from reap.files.safefile import LFS_POINTER
from reap.text.samples import Tally, Text, sample_text

JSON_ROWS = (".jsonl", ".ndjson")
NAMED_JSON_ROWS = (*JSON_ROWS, ".json")  # a file by name; in a folder .json may be anything
COMPRESSED = (".gz", ".zst")
PARQUET = ".parquet"
TABLES = {".csv": ",", ".tsv": "\t"}  # with a line of names first; in a folder they may be anything
# How files begin whose name should say what they are.
_PACKED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": PARQUET}
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
TEXT_SUFFIXES = frozenset(
    ".txt .md .rst .tex .py .pyi .pyx .c .h .cc .cpp .cxx .hpp .cu .cuh .rs .go .java .kt .scala"
    " .js .jsx .ts .tsx .css .html .rb .php .pl .lua .r .jl .m .swift .cs .fs .hs .ml .clj .ex"
    " .erl .sh .sql .proto .cmake .toml .yaml .yml".split()
)
_BLOCK = 1 << 20  # characters of a text file that are tokenized at a time
_ROWS = 256  # of a parquet file at a time
_FOREIGN = ("zstandard", "pyarrow")  # whose errors say that a file is damaged


class Row(NamedTuple):
    """A row of a file: JSON that is not parsed yet, or its columns."""

    where: str
    content: bytes | Any
    share: float


def suffix(path: str | os.PathLike[str]) -> str:
    """What a name says of the content; a compression's suffix is not part of it."""
    return unpacked(path).suffix.lower()


def unpacked(path: str | os.PathLike[str]) -> Path:
    """The name without a compression's suffix."""
    inner = Path(path)
    return inner.with_suffix("") if inner.suffix.lower() in COMPRESSED else inner


def has_rows(path: str | os.PathLike[str]) -> bool:
    """Whether a file that was named holds rows with columns, rather than text."""
    return suffix(path) in (*NAMED_JSON_ROWS, PARQUET, *TABLES)


def is_known(name: str) -> bool:
    """Whether a file in a folder is read."""
    return suffix(name) in (*JSON_ROWS, PARQUET, *TEXT_SUFFIXES)


def check_readable(path: Path) -> None:
    """ReapError for a file that needs a package which is not there."""
    if suffix(path) == PARQUET:
        _package("pyarrow.parquet", path)
    elif path.suffix.lower() == ".zst":
        _package("zstandard", path)


def texts(path: Path, tokenizer: Any, column: str, tally: Tally) -> Iterator[Text]:
    """The documents of one file. ReapError, naming file and line, for what is not text; with
    `tally.skip_bad` a bad row is left out, and so is the rest of a file that cannot be read."""
    if not has_rows(path):
        if column:
            raise ReapError(f"{path}: has no columns, so there is no {column!r}")
        yield from _plain_text(path, tally)
        return
    try:
        for row in _rows(path):
            try:
                sample = row.content
                if isinstance(sample, bytes):
                    sample = _parse(sample, row.where)
                text = sample_text(sample, row.where, tokenizer, column, tally)
            except ReapError as error:
                tally.refuse(error)
                continue
            if text is not None:
                yield text._replace(share=row.share)
    except ReapError as error:
        if not isinstance(error, _Unreadable):
            raise
        tally.refuse(error)


class _Unreadable(ReapError):
    """The rest of a file cannot be read."""


def _plain_text(path: Path, tally: Tally) -> Iterator[Text]:
    """One document, in blocks that end at a line's end where lines are of usual length."""
    begun = False
    try:
        with _opened(path) as (stream, raw, size):
            file = io.TextIOWrapper(stream, encoding="utf-8-sig")
            block = _read_block(file)
            tally.empty += not block
            while block:
                if "\0" in block:
                    raise _Unreadable(f"{path}: holds a zero byte, it is not a text file")
                following = _read_block(file)
                share = min(1.0, raw.tell() / size) if size else float("nan")
                begun = bool(following)
                yield Text(block, str(path), ends=not following, share=share)
                block = following
    except UnicodeDecodeError as error:
        tally.refuse(
            ReapError(
                f"{path}: byte 0x{error.object[error.start]:02x} is not UTF-8 ({error.reason}): "
                "convert the file or leave it out"
            )
        )
    except _Unreadable as error:
        tally.refuse(error)
    if begun:  # what was read of a bad file is a document of its own
        yield Text("", str(path))


def _read_block(file: Any) -> str:
    block = file.read(_BLOCK)
    return block + file.readline(_BLOCK) if len(block) == _BLOCK else block


def _rows(path: Path) -> Iterator[Row]:
    if suffix(path) == PARQUET:
        yield from _parquet_rows(path)
        return
    if suffix(path) in TABLES:
        yield from _table_rows(path)
        return
    with _opened(path) as (stream, raw, size):
        done, first = 0, True
        for number, line in enumerate(stream, 1):
            done += len(line)
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            if first and line.lstrip().startswith(b"["):
                yield from _array_rows(path, line + stream.read(), number)
                return
            first = False
            read = raw.tell() if path.suffix.lower() in COMPRESSED else done
            yield Row(f"{path}, line {number}", line, min(1.0, read / size) if size else _NAN)


_NAN = float("nan")


def _array_rows(path: Path, content: bytes, line: int) -> Iterator[Row]:
    """One JSON array of objects, which has to be held whole."""
    rows = _parse(content, f"{path}, line {line}", "a file that begins with [ is one array")
    for number, row in enumerate(rows, 1):
        yield Row(f"{path}, row {number}", row, number / len(rows))


def _table_rows(path: Path) -> Iterator[Row]:
    with _opened(path) as (stream, raw, size):
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        rows = csv.DictReader(text, delimiter=TABLES[suffix(path)], strict=True)
        try:
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                if None in row or None in row.values():
                    raise _Unreadable(f"{where}: has not as many fields as the first line names")
                yield Row(where, row, min(1.0, raw.tell() / size) if size else _NAN)
        except csv.Error as error:
            raise _Unreadable(f"{path}, line {rows.line_num}: {error}") from None
        except UnicodeDecodeError as error:  # anywhere in what is read at a time
            raise _Unreadable(f"{path}: is not UTF-8 ({error}): convert the file") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    parquet = _package("pyarrow.parquet", path)
    with _reading(path):
        file = parquet.ParquetFile(path)
        total, number = file.metadata.num_rows, 0
        for batch in file.iter_batches(batch_size=_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield Row(f"{path}, row {number}", row, number / total)


def _parse(content: bytes, where: str, rule: str = "every line must be one object") -> Any:
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ReapError(f"{where}: not JSON ({error}): {rule}") from None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any, int]]:
    """(bytes, the file that they come from, its size; 0 for a pipe)."""
    with _reading(path), open(path, "rb", buffering=0) as raw:
        size = os.fstat(raw.fileno()).st_size
        packed = path.suffix.lower()
        if packed == ".gz":
            yield io.BufferedReader(gzip.GzipFile(fileobj=raw)), raw, size
        elif packed == ".zst":
            unpacker = _package("zstandard", path).ZstdDecompressor()
            yield io.BufferedReader(unpacker.stream_reader(raw, read_across_frames=True)), raw, size
        else:
            stream = io.BufferedReader(raw)
            _check_start(stream.peek(len(LFS_POINTER)), path)
            yield stream, raw, size


def _check_start(start: bytes, path: Path) -> None:
    """ReapError for a file that is not what its name says."""
    if start.startswith(LFS_POINTER):
        raise _Unreadable(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`")
    if start.startswith(_UTF16):
        raise _Unreadable(f"{path} is UTF-16: convert it to UTF-8, say with iconv")
    for magic, end in _PACKED.items():
        if start.startswith(magic):
            raise _Unreadable(f"{path} holds what files called *{end} hold: name it so")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What goes wrong inside while `path` is read, as a ReapError."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise _Unreadable(f"{path}: cannot be read ({reason})") from None
    except Exception as error:
        if type(error).__module__.split(".")[0] not in _FOREIGN:
            raise
        raise _Unreadable(f"{path}: cannot be read ({first_line(error)})") from None


def _package(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.split(".")[0]
        raise ReapError(f"{path}: needs the `{package}` package: pip install {package}") from None
