"""Where text comes from: specs that a user can type, and the documents behind them.

notes.txt   chats.jsonl   rows.parquet:column   src   "src/**/*.py"   stdlib:code
stdlib:prose/heldout   hf:org/name:split:column   hf:org/name/config   and any of them with a share
of the tokens: stdlib:code=3
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap.errors import ReapError, first_line
from reap.files.hub import HUB_ID
from reap.text import localfiles, stdlib_text
from reap.text.samples import Tally, Text, sample_text

_HUB_ID_CONFIG = re.compile(HUB_ID.pattern + r"(/[\w.-]+)?")
_SHUFFLED = 1024  # samples of a hub data set that are held while shuffling


@dataclass(frozen=True)
class Source:
    """One parsed spec. `kind` is "files", "stdlib" or "hub"; `weight` is its share of the tokens
    relative to the other sources; `domain` names its statistics; `column` is that of files."""

    spec: str
    kind: str
    target: str
    domain: str
    weight: float = 1.0
    column: str = ""


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
    local, column = _split_column(target)
    if os.path.exists(local) or glob.has_magic(local):
        return Source(spec, "files", local, _local_domain(local), weight, column)
    hub = target.removeprefix("hf:")
    data_set = hub.split(":")[0]
    looks_local = localfiles.has_rows(data_set) or localfiles.is_known(data_set)
    explicit = target.startswith("hf:")
    hub_id = _HUB_ID_CONFIG if explicit else HUB_ID  # three names are rather a mistyped path
    if hub_id.fullmatch(data_set) and (explicit or not looks_local):
        return Source(spec, "hub", hub, data_set.split("/")[1], weight)
    raise ReapError(
        f"data {spec!r}: there is no such file or folder, and it is neither stdlib:code, "
        "stdlib:prose nor a hub data set (hf:org/name)"
    )


def _split_column(target: str) -> tuple[str, str]:
    """A local name and the column behind its colon; a name may hold a colon itself."""
    name, _, column = target.rpartition(":")
    if not name or not column or os.path.exists(target) or glob.glob(target, recursive=True):
        return target, ""
    if os.path.exists(name) or (glob.has_magic(name) and not glob.has_magic(column)):
        return name, column
    return target, ""


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
        return localfiles.unpacked(target).stem
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part), Path(target).parts)
    return Path(*fixed).resolve().name


def check_distinct(sources: Sequence[Source], seed: int) -> None:
    """ReapError for text that two sources name: the same file under any name, or equal files."""
    owners: dict[Any, Source] = {}
    for source in sources:
        for key, what in _contents(source, seed):
            other = owners.setdefault(key, source)
            if other is not source:
                raise ReapError(
                    f"data {other.spec!r} and {source.spec!r} both hold {what}: give it once, "
                    "with a weight (=2) if it is to count more"
                )
    sizes: dict[Any, list[Source]] = {}
    for source in sources:
        if source.kind == "files":
            sizes.setdefault((source.column, _sizes(source, seed)), []).append(source)
    for alike in (group for (_, size), group in sizes.items() if len(group) > 1 and any(size)):
        digests: dict[Any, Source] = {}
        for source in alike:
            other = digests.setdefault(_digests(source, seed), source)
            if other is not source:
                raise ReapError(
                    f"data {other.spec!r} and {source.spec!r} hold the same text: give it once, "
                    "with a weight (=2) if it is to count more"
                )


def _contents(source: Source, seed: int) -> Iterator[tuple[Any, str]]:
    """What a source reads, as a key that is the same under any name, and how to call it."""
    if source.kind == "hub":
        name, split, column = (*source.target.split(":"), "", "")[:3]
        yield (name, split or "train", column or "text"), name
    elif source.kind == "stdlib":
        yield source.target, source.target
    else:
        for path in _regular(source, seed):
            about = path.stat()
            yield (about.st_dev, about.st_ino, source.column), str(path)


def _sizes(source: Source, seed: int) -> tuple[int, ...]:
    return tuple(sorted(path.stat().st_size for path in _regular(source, seed)))


def _digests(source: Source, seed: int) -> tuple[bytes, ...]:
    found = []
    for path in _regular(source, seed):
        digest = hashlib.sha256()
        try:
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise ReapError(f"{path}: cannot be read ({error.strerror})") from None
        found.append(digest.digest())
    return tuple(sorted(found))


def _regular(source: Source, seed: int) -> list[Path]:
    """Its files that can be read twice."""
    return [path for path in _paths(source, seed) if path.is_file()]


def read(source: Source, tokenizer: Any, seed: int, tally: Tally | None = None) -> Iterator[Text]:
    """The documents of a source. The seed orders files, and shuffles a hub data set; the lines of
    a file stay as they are. The tokenizer is there for its chat template. ReapError at once for a
    folder or glob without text files, and on the way, naming file and line, for what is not text
    or, where the tally says so, counted there."""
    tally = Tally() if tally is None else tally
    if source.kind == "stdlib":
        return tally.watch(_stdlib_texts(source, seed))
    if source.kind == "hub":
        return tally.watch(_hub_texts(source, tokenizer, seed, tally))
    paths = _paths(source, seed)
    for path in paths:
        localfiles.check_readable(path)
    return tally.watch(_file_texts(source, paths, tokenizer, tally))


def _stdlib_texts(source: Source, seed: int) -> Iterator[Text]:
    domain, _, part = source.target.removeprefix("stdlib:").partition("/")
    names = stdlib_text.names(domain, held_out=bool(part), seed=seed)
    for number, name in enumerate(names, 1):
        text = stdlib_text.read(name, domain)
        if text:
            yield Text(text, name, share=number / len(names))


def _file_texts(source: Source, paths: list[Path], tokenizer: Any, tally: Tally) -> Iterator[Text]:
    for number, path in enumerate(paths):
        for text in localfiles.texts(path, tokenizer, source.column, tally):
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
            if localfiles.is_known(name) and not name.startswith("."):
                yield Path(folder, name)


def _refuse_folder(error: OSError) -> None:
    raise ReapError(f"{error.filename}: cannot be read ({error.strerror})")


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


def _hub_texts(source: Source, tokenizer: Any, seed: int, tally: Tally) -> Iterator[Text]:
    name, split, column = (*source.target.split(":"), "", "")[:3]
    parts = name.split("/")  # organisation, name and perhaps a configuration
    try:
        data_set = require_datasets(source).load_dataset(
            "/".join(parts[:2]), *parts[2:], split=split or "train", streaming=True
        )
        samples = data_set.shuffle(seed=seed, buffer_size=_SHUFFLED)
        for number, sample in enumerate(samples, 1):
            try:
                text = sample_text(sample, f"{name}, sample {number}", tokenizer, column, tally)
            except ReapError as error:
                tally.refuse(error)
                continue
            if text is not None:
                yield text
    except ReapError:
        raise
    except Exception as error:  # a network, a server and file formats are behind this iterator
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ReapError(f"data {source.spec!r}: {reason}") from error
