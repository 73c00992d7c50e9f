"""Four kinds of text out of the Python standard library, labelled, the same on every machine.

`library` is the code of its modules and `tests` that of its test suite (without docstrings and
comments), `prose` these docstrings and comments and the language reference, `tables` the sources of
the character tables of `encodings`. A sixteenth of each is held out by a hash of the file's name,
as everywhere (`reap.text.stdlib_text`).
"""

from __future__ import annotations

import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from reap.text import stdlib_text

DOMAINS = ("library", "tests", "prose", "tables")


def texts(domain: str, *, held_out: bool, seed: int = 0) -> Iterator[str]:
    """The texts of one domain on one side of the split, in an order that the seed decides."""
    if domain == "tables":
        yield from _tables(held_out, seed)
        return
    kind = "prose" if domain == "prose" else "code"
    for name in stdlib_text.names(kind, held_out=held_out, seed=seed):
        if kind == "prose" or is_test(name) == (domain == "tests"):
            text = stdlib_text.read(name, kind)
            if text:
                yield text


def is_test(name: str) -> bool:
    parts = PurePosixPath(name).parts[:-1]
    return any(part in {"test", "tests", "idle_test"} for part in parts)


def _tables(held_out: bool, seed: int) -> Iterator[str]:
    folder = Path(sysconfig.get_paths()["stdlib"]) / "encodings"
    names = [f"encodings/{path.name}" for path in folder.glob("*.py")]
    names = [name for name in names if stdlib_text.is_held_out(name) == held_out]
    for name in sorted(names, key=lambda name: stdlib_text.digest(f"{seed}/{name}")):
        with tokenize.open(folder.parent / name) as file:
            yield file.read()
