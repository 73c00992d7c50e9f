"""Where text comes from: specs that a user can type, and the documents behind them.

notes.txt   chats.jsonl   src   "src/**/*.py"   stdlib:code   stdlib:prose/heldout
hf:org/name:split:column   hf:org/name/config   and any of them with a share of the tokens:
stdlib:code=3
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from reap.errors import ReapError, first_line
from reap.files.hub import HUB_ID
from reap.text import stdlib_text

JSON_LINES = (".jsonl", ".ndjson")
NAMED_JSON_LINES = (*JSON_LINES, ".json")  # a file by name; in a folder .json may be anything
TEXT_SUFFIXES = frozenset(
    ".txt .md .rst .tex .py .pyi .pyx .c .h .cc .cpp .cxx .hpp .cu .cuh .rs .go .java .kt .scala"
    " .js .jsx .ts .tsx .css .html .rb .php .pl .lua .r .jl .m .swift .cs .fs .hs .ml .clj .ex"
    " .erl .sh .sql .proto .cmake .toml .yaml .yml".split()
)
_HUB_ID_CONFIG = re.compile(HUB_ID.pattern + r"(/[\w.-]+)?")
_BLOCK = 1 << 20  # characters of a text file that are tokenized at a time
_SHUFFLED = 1024  # samples of a hub data set that are held while shuffling


@dataclass(frozen=True)
class Source:
    """One parsed spec. `kind` is "files", "stdlib" or "hub"; `weight` is its share of the tokens
    relative to the other sources; `domain` names its statistics."""

    spec: str
    kind: str
    target: str
    domain: str
    weight: float = 1.0


class Text(NamedTuple):
    """A piece of a document. `where` names it in errors, `ends` marks the document's last piece,
    `templated` text already carries its special tokens. `share`, of its file and then of its
    source, is what has been read when this piece has: up to 1, NaN where it cannot be told."""

    text: str
    where: str
    ends: bool = True
    templated: bool = False
    share: float = math.nan


def parse_spec(spec: str) -> Source:
    """Which source a spec names (see the top of this file). A local name wins over a hub data set
    of the same name. ReapError when it names nothing, or its weight is not a positive number."""
    target, weight = spec, 1.0
    name, equals, share = spec.rpartition("=")
    if equals and "/" not in share and not os.path.exists(spec):
        target = name
        try:
            weight = float(share)
        except ValueError:
            weight = math.nan
        if not (0 < weight < math.inf):
            raise ReapError(f"data {spec!r}: weight {share!r} is not a positive number")
    if not target:
        raise ReapError(f"data {spec!r} names nothing: give a file, a folder or stdlib:code")
    if target.startswith("stdlib:"):
        domain, _, part = target.removeprefix("stdlib:").partition("/")
        if domain not in stdlib_text.DOMAINS or part not in ("", "heldout"):
            raise ReapError(
                f"data {spec!r} is not in the standard library's text: choose stdlib:code or "
                "stdlib:prose, with /heldout for the held-out part"
            )
        return Source(spec, "stdlib", target, domain, weight)
    if os.path.exists(target) or glob.has_magic(target):
        return Source(spec, "files", target, _local_domain(target), weight)
    hub = target.removeprefix("hf:")
    data_set = hub.split(":")[0]
    looks_local = Path(target).suffix.lower() in (*NAMED_JSON_LINES, *TEXT_SUFFIXES)
    explicit = target.startswith("hf:")
    hub_id = _HUB_ID_CONFIG if explicit else HUB_ID  # three names are rather a mistyped path
    if hub_id.fullmatch(data_set) and (explicit or not looks_local):
        return Source(spec, "hub", hub, data_set.split("/")[1], weight)
    raise ReapError(
        f"data {spec!r}: there is no such file or folder, and it is neither stdlib:code, "
        "stdlib:prose nor a hub data set (hf:org/name)"
    )


def local_names(source: Source) -> list[str]:
    """The files and folders that a source reads."""
    if source.kind != "files":
        return []
    exists = os.path.exists(source.target)
    return [source.target] if exists else glob.glob(source.target, recursive=True)


def _local_domain(target: str) -> str:
    """A file's stem, a folder's name, and for a glob the name of the folder that it starts in."""
    if os.path.isdir(target):
        return Path(target).resolve().name
    if os.path.exists(target):  # a pipe too, and by its own name: /dev/stdin is a link
        return Path(target).stem
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part), Path(target).parts)
    return Path(*fixed).resolve().name


def read(source: Source, tokenizer: Any, seed: int) -> Iterator[Text]:
    """The documents of a source. The seed orders files, and shuffles a hub data set; the lines of
    a file stay as they are. The tokenizer is there for its chat template. ReapError at once for a
    folder or glob without text files, and on the way, naming file and line, for what is not text.
    """
    if source.kind == "stdlib":
        return _stdlib_texts(source, seed)
    if source.kind == "hub":
        return _hub_texts(source, tokenizer, seed)
    return _file_texts(_paths(source, seed), tokenizer)


def _stdlib_texts(source: Source, seed: int) -> Iterator[Text]:
    domain, _, part = source.target.removeprefix("stdlib:").partition("/")
    names = stdlib_text.names(domain, held_out=bool(part), seed=seed)
    for number, name in enumerate(names, 1):
        text = stdlib_text.read(name, domain)
        if text:
            yield Text(text, name, share=number / len(names))


def _file_texts(paths: list[Path], tokenizer: Any) -> Iterator[Text]:
    for number, path in enumerate(paths):
        json_lines = path.suffix.lower() in NAMED_JSON_LINES
        for text in _json_lines(path, tokenizer) if json_lines else _plain_text(path):
            yield text._replace(share=(number + text.share) / len(paths))


def _paths(source: Source, seed: int) -> list[Path]:
    """The files of a source in an order that the seed decides; what a folder holds beside text of
    a known suffix, and hidden files and folders, are not part of it."""
    target = Path(source.target)
    if target.exists() and not target.is_dir():  # a pipe will do
        return [target]
    root = target if target.is_dir() else Path()
    if target.is_dir():
        found = list(_walk(target))
    else:
        names = glob.glob(source.target, recursive=True)
        found = [Path(name) for name in names if os.path.isfile(name)]
    if not found:
        raise ReapError(f"data {source.spec!r}: no text files there")

    def key(path: Path) -> bytes:
        name = os.path.relpath(path, root).replace(os.sep, "/")
        return hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest()

    return sorted(found, key=key)


def _walk(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root, onerror=_refuse_folder):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in names:
            known = Path(name).suffix.lower() in (*JSON_LINES, *TEXT_SUFFIXES)
            if known and not name.startswith("."):
                yield Path(folder, name)


def _refuse_folder(error: OSError) -> None:
    raise ReapError(f"{error.filename}: cannot be read ({error.strerror})")


def _plain_text(path: Path) -> Iterator[Text]:
    """One document, in blocks that end at a line's end where lines are of usual length."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            size = os.fstat(file.fileno()).st_size  # 0 for a pipe
            block = _read_block(file)
            while block:
                if "\0" in block:
                    raise ReapError(f"{path}: holds a zero byte, it is not a text file")
                following = _read_block(file)
                share = math.nan
                if size:
                    share = min(1.0, os.lseek(file.fileno(), 0, os.SEEK_CUR) / size)
                yield Text(block, str(path), ends=not following, share=share)
                block = following
    except UnicodeDecodeError as error:
        raise ReapError(
            f"{path}: byte 0x{error.object[error.start]:02x} is not UTF-8 ({error.reason}): "
            "convert the file or leave it out"
        ) from None
    except OSError as error:
        raise ReapError(f"{path}: cannot be read ({error.strerror})") from None


def _read_block(file: Any) -> str:
    block = file.read(_BLOCK)
    return block + file.readline(_BLOCK) if len(block) == _BLOCK else block


def _json_lines(path: Path, tokenizer: Any) -> Iterator[Text]:
    try:
        with open(path, "rb") as file:
            size, done = os.fstat(file.fileno()).st_size, 0  # 0 for a pipe
            for number, line in enumerate(file, 1):
                done += len(line)
                if line.strip():
                    where = f"{path}, line {number}"
                    try:
                        sample = json.loads(line.decode("utf-8-sig"))
                    except (ValueError, RecursionError) as error:
                        raise ReapError(
                            f"{where}: not JSON ({error}): every line must be one object"
                        ) from None
                    text = _sample_text(sample, where, tokenizer, "text")
                    yield text._replace(share=min(1.0, done / size) if size else math.nan)
    except OSError as error:
        raise ReapError(f"{path}: cannot be read ({error.strerror})") from None


def _sample_text(sample: Any, where: str, tokenizer: Any, column: str) -> Text:
    """The text of one sample: its `column`, or its `messages` through the chat template."""
    fields = sample if isinstance(sample, dict) else {}
    if isinstance(fields.get(column), str):
        text, templated = fields[column], False
    elif isinstance(fields.get("messages"), list) and fields["messages"]:
        if not getattr(tokenizer, "chat_template", None):
            raise ReapError(f"{where}: has chat messages, but the tokenizer has no chat template")
        try:
            text = tokenizer.apply_chat_template(fields["messages"], tokenize=False)
        except Exception as error:  # the template is the model author's program: anything goes
            raise ReapError(f"{where}: the chat template refuses its messages ({error})") from error
        templated = True
    else:
        raise ReapError(
            f'{where}: needs "{column}", a string, or "messages", a list of {{"role", "content"}}'
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ReapError(f"{where}: holds half of a surrogate pair, it is not text") from None
    return Text(text, where, templated=templated)


def require_datasets(source: Source) -> Any:
    """The optional `datasets` package; ReapError where it is not installed."""
    try:
        package = importlib.import_module("datasets")
        # Releases that still run code of a data set ask on the terminal whether to, reading stdin.
        if hasattr(package, "config"):
            package.config.HF_DATASETS_TRUST_REMOTE_CODE = False
        return package
    except ImportError:
        raise ReapError(
            f"data {source.spec!r} is on the hub, which needs the `datasets` package: "
            "pip install datasets"
        ) from None


def _hub_texts(source: Source, tokenizer: Any, seed: int) -> Iterator[Text]:
    name, split, column = (*source.target.split(":"), "", "")[:3]
    parts = name.split("/")  # organisation, name and perhaps a configuration
    try:
        data_set = require_datasets(source).load_dataset(
            "/".join(parts[:2]), *parts[2:], split=split or "train", streaming=True
        )
        samples = data_set.shuffle(seed=seed, buffer_size=_SHUFFLED)
        for number, sample in enumerate(samples, 1):
            yield _sample_text(sample, f"{name}, sample {number}", tokenizer, column or "text")
    except ReapError:
        raise
    except Exception as error:  # a network, a server and file formats are behind this iterator
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ReapError(f"data {source.spec!r}: {reason}") from error
