"""Mutants of csrc/cuda/*.cuh, made mechanically from the source: each takes one barrier, one wait
or one condition out of the kernels.

All of them are in one copy of the sources, where a global says which one is out of order, so that
they are compiled once:

    __syncthreads();            { if (mutant != 7) __syncthreads(); }
    cp_async_wait<N>();         { if (mutant == 8) cp_async_wait<N + 1>(); else ...; } and as above
    if (a < b) return;          if (mutant != 9 && (a < b)) return;
    if (a < b) store            if (mutant == 10 || (a < b)) store      and each of a && b likewise
    min(a, b)                   (mutant == 11 ? (a) : min(a, b))
    a < b ? c : d               (mutant == 12 || a < b) ? c : d
    cp_async16(to, from, a)     cp_async16(to, from, (mutant == 13 || (a)))
"""

import re
import shutil
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

FILES = (
    "routing.cuh", "tiles.cuh", "staging.cuh", "gate_up.cuh", "combine.cuh", "down.cuh",
    "finish.cuh", "zero.cuh",
)  # fmt: skip
SM90_FILES = (
    "sm90/pipeline.cuh", "sm90/inner.cuh", "sm90/gate_up.cuh", "sm90/combine.cuh", "sm90/down.cuh",
    "sm90/pingpong.cuh",
)  # fmt: skip
SUM_FILES = ("sums.cuh",)
SWAPPED_FILES = tuple(f"sm90/swapped/{name}.cuh" for name in ("tile", "gate_up", "down"))
STATEMENT = re.compile(
    r"__syncthreads\(\);|__syncwarp\(\);|cp_async_wait<(?P<groups>[^;]*)>\(\);|cp_async_commit\(\);"
    r"|\b(?:wait|wait_empty|drain|fence_\w+|wgmma_(?:fence|commit|wait<\d>)|mbarrier_arrive\w*"
    r"|cp_async_mbarrier_arrive|bulk_commit|bulk_wait_read|named_barrier|meet|pass_over"
    r"|wait_for_launch_before)"
    r"\([^;{}]*\);"
)
LEAVES = re.compile(r"\)\s*(return|break|continue)\b")
CHOICE = re.compile(r"[\w.]+(?: [-+*/] [\w.]+)* (<|<=|>=) [\w.]+(?= \?)")


@dataclass(frozen=True)
class Mutant:
    number: int  # from 1
    file: str
    line: int
    text: str  # what is taken out; twice for a wait, whose second mutant waits for one group less


def find(folder: Path, files: tuple[str, ...] = FILES) -> list[Mutant]:
    """All mutants of the kernels in `files` of `folder`/cuda."""
    mutants: list[Mutant] = []
    for file in files:
        mutants += _rewrite(folder, file, len(mutants) + 1)[1]
    return mutants


def each(found: Iterable[Mutant], equivalent: Container[tuple[str, str]]) -> list:
    """For pytest. One that makes no difference goes through all runs, so that is slow."""
    return [
        pytest.param(
            mutant,
            id=f"{mutant.file}:{mutant.line}-{mutant.text}",
            marks=[pytest.mark.slow] if (mutant.file, mutant.text) in equivalent else [],
        )
        for mutant in found
    ]


def write(
    folder: Path,
    target: Path,
    files: tuple[str, ...] = FILES + SM90_FILES + SUM_FILES + SWAPPED_FILES,
) -> None:
    """A copy of the sources at `target`, with a switch for each mutant."""
    shutil.copytree(folder, target)
    number = 1
    for file in files:
        text, mutants = _rewrite(folder, file, number)
        (target / "cuda" / file).write_text(text)
        number += len(mutants)


def _rewrite(folder: Path, file: str, number: int) -> tuple[str, list[Mutant]]:
    """The file with its switches, the first of which has that number."""
    source = re.sub(r"//.*", "", (folder / "cuda" / file).read_text())
    mutants, edits = [], []
    for start, end, opening, closing in _sites(source):
        line = source.count("\n", 0, start) + 1
        mutants.append(Mutant(number, file, line, " ".join(source[start:end].split())))
        # Of two edits at one place the outer opens first and closes last.
        edits.append((start, 1, number, opening.replace("#", str(number))))
        edits.append((end, 0, -number, closing))
        number += 1
    for place, _, _, text in sorted(edits, reverse=True):
        source = source[:place] + text + source[place:]
    return source, mutants


def _sites(source: str) -> Iterator[tuple[int, int, str, str]]:
    """Start and end of each site and what goes around it; outer sites before inner ones."""
    for found in STATEMENT.finditer(source):
        yield *found.span(), "{ if (mutant != #) ", " }"
        if found["groups"]:  # wait for one group less
            weaker = f"cp_async_wait<({found['groups']}) + 1>();"
            yield *found.span(), f"{{ if (mutant == #) {weaker} else ", " }"
    for found in re.finditer(r"\bif \(", source):
        start, end = found.end(), _closing(source, found.end())
        leaves = LEAVES.match(source, end)
        yield start, end, "mutant != # && (" if leaves else "mutant == # || (", ")"
        terms = _split(source, start, end, "&&")
        for first, last in terms if len(terms) > 1 else []:
            yield first, last, "(mutant == # || (", "))"
    for found in re.finditer(r"\bmin\(", source):
        end = _closing(source, found.end())
        argument = source[slice(*_split(source, found.end(), end, ",")[0])]
        yield found.start(), end + 1, f"(mutant == # ? ({argument}) : ", ")"
    for found in re.finditer(r"\bcp_async16\(", source):
        end = _closing(source, found.end())
        yield *_split(source, found.end(), end, ",")[2], "(mutant == # || (", "))"
    for found in CHOICE.finditer(source):
        yield *found.span(), "(mutant == # || ", ")"


def _closing(source: str, start: int) -> int:
    """Where the bracket closes that was opened before `start`."""
    depth = 1
    for place in range(start, len(source)):
        depth += {"(": 1, ")": -1}.get(source[place], 0)
        if depth == 0:
            return place
    raise ValueError("unbalanced")


def _split(source: str, start: int, end: int, separator: str) -> list[tuple[int, int]]:
    """The parts between separators that are in no bracket, without the space around them."""
    places, depth = [start], 0
    for place in range(start, end):
        depth += {"(": 1, ")": -1}.get(source[place], 0)
        if depth == 0 and source.startswith(separator, place):
            places += [place, place + len(separator)]
    places.append(end)
    parts = zip(places[::2], places[1::2], strict=True)
    return [
        (last - len(source[first:last].lstrip()), first + len(source[first:last].rstrip()))
        for first, last in parts
    ]
