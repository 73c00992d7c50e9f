"""The Python standard library's own sources as text: code on one side, English on the other.

Real text that is on every machine which can run this package: no hub, no download. `code` is a
module's source without its docstrings and comments; `prose` is those docstrings and comments, and
the language reference that ships as `pydoc_data.topics`. About a sixteenth of it is held out, by a
hash of the file's name, so that the split is the same in every order and on every machine.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import io
import os
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from reap.errors import ReapError

DOMAINS = ("code", "prose")
HELD_OUT_ONE_IN = 16

# Installed packages are not the standard library; `encodings` is character tables, `pydoc_data` is
# read entry by entry below, and `_sysconfigdata` holds paths of this machine.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
_SKIPPED_PREFIX = "_sysconfigdata"
_TOPIC = "topics:"  # before the key of a topic, where other names are paths
_LAYOUT = {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}


def documents(domain: str, *, held_out: bool, seed: int = 0) -> Iterator[tuple[str, str]]:
    """(name, text) of one domain ("code" or "prose") and one side of the split, in an order that
    the seed decides. Files which do not decode or tokenize (the test suite has some, on purpose)
    are left out. ReapError when this Python has no sources."""
    for name in names(domain, held_out=held_out, seed=seed):
        text = read(name, domain)
        if text:
            yield name, text


def names(domain: str, *, held_out: bool, seed: int = 0) -> list[str]:
    """What `documents` reads, in its order; not all of it has text of the domain."""
    if domain not in DOMAINS:
        raise ReapError(f"stdlib text has no domain {domain!r}: choose one of {', '.join(DOMAINS)}")
    root = _root()
    found = list(_source_names(root))
    if domain == "prose":
        found += [_TOPIC + key for key in _topics()]
    found = [name for name in found if is_held_out(name) == held_out]
    if not found:
        raise ReapError(f"this Python has no standard library sources in {root}: give local text")
    return sorted(found, key=lambda name: digest(f"{seed}/{name}"))


def read(name: str, domain: str) -> str:
    """The text of one domain in one of `names`; empty where there is none."""
    if name.startswith(_TOPIC):
        return _topics()[name.removeprefix(_TOPIC)]
    try:
        with tokenize.open(_root() / name) as file:
            return dict(zip(DOMAINS, split_source(file.read()), strict=True))[domain]
    except (SyntaxError, UnicodeDecodeError, tokenize.TokenError, OSError):
        return ""


def is_held_out(name: str) -> bool:
    """Which side of the split a file (its path below the library's root, with /) is on."""
    return digest(name) % HELD_OUT_ONE_IN == 0


def split_source(source: str) -> tuple[str, str]:
    """(code, prose) of one Python source. Code keeps the lines and their indentation and drops
    comments, strings that stand alone as a statement, and the lines these leave empty; it is text
    to read, not to run. Prose is what was dropped, where it reads as English, in the same order.
    SyntaxError or tokenize.TokenError when the source does not tokenize."""
    kept = io.StringIO(source).readlines()
    prose: list[str] = []
    block: list[str] = []
    block_ends = -1
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    after_layout = True
    for token, following in zip(tokens, tokens[1:], strict=False):
        (first, start), last = token.start, token.end[0]
        if token.type == tokenize.COMMENT:
            if first > block_ends + 1:
                prose.append("\n".join(block))
                block = []
            block.append(token.string.lstrip("#:! ").rstrip())
            block_ends = last
            kept[first - 1] = kept[first - 1][:start].rstrip() + "\n"
            continue
        if (
            token.type == tokenize.STRING
            and after_layout
            and following.type
            in (
                tokenize.NEWLINE,
                tokenize.COMMENT,
            )
        ):
            prose += ["\n".join(block), _docstring(token.string)]
            block = []
            kept[first - 1] = kept[first - 1][:start].rstrip() + "\n"
            for line in range(first, last):
                kept[line] = ""
        after_layout = token.type in _LAYOUT
    prose.append("\n".join(block))
    code = "".join(line.rstrip() + "\n" for line in kept if line.strip())
    return code, "\n\n".join(text for text in prose if _reads_as_english(text))


def _docstring(literal: str) -> str:
    if "f" in literal[: literal.index(literal[-1])].lower():
        return ""  # an f-string; newer Pythons do not even tokenize it as a string
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\d" in an old docstring
        value = ast.literal_eval(literal)
    return inspect.cleandoc(value) if isinstance(value, str) else ""


def _reads_as_english(text: str) -> bool:
    words = re.findall(r"[A-Za-z]{2,}", text)
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return len(words) >= 5 and letters >= 0.75 * len(text)


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _source_names(root: Path) -> Iterator[str]:
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in _SKIPPED_FOLDERS]
        for file in files:
            if file.endswith(".py") and not file.startswith(_SKIPPED_PREFIX):
                yield (Path(folder) / file).relative_to(root).as_posix()


def _topics() -> dict[str, str]:
    try:
        return dict(importlib.import_module("pydoc_data.topics").topics)
    except ImportError:  # some distributions package it separately
        return {}


def digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
