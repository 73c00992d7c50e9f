"""What may be written where: never over what a command reads, and only over what is ours."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from reap.errors import ReapError
from reap.files.safefile import open_regular, parse_json, read_header, read_json

# What our files call themselves, in the field "format".
STATISTICS, PLAN, MERGE = "reap-statistics", "reap-plan", "reap-merge"
PRUNED, MERGED, REPORT = "reap-pruned", "reap-merged", "reap-report"
TRACE = "reap-trace"
KINDS = {
    STATISTICS: "statistics",
    PLAN: "a plan",
    MERGE: "a merge",
    PRUNED: "the record of a pruned model",
    MERGED: "the record of a merged model",
    REPORT: "a report",
    TRACE: "a trace",
}
RECORDS = (PRUNED, MERGED)
_PAGE = f'<meta name="generator" content="{REPORT}">'.encode()  # near the start of a report
RECORD = "reap.json"
# What model savers, the hub and `prune` put into a model's folder. Of another name, a file of
# weights is ours only where a record or an index names it: statistics are safetensors files too.
OF_A_MODEL = re.compile(
    r"config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors"
    r"|model\.safetensors\.index\.json|(tokenizer|vocab|special_tokens_map|added_tokens)[\w.-]*"
    r"|merges\.txt|chat_template[\w.-]*|[\w-]*processor_config\.json"
    r"|(configuration|modeling|tokenization|processing|image_processing)_\w+\.py"
    r"|README(\.base)*\.md|LICENSE[\w.-]*|NOTICE[\w.-]*|\.gitattributes|reap(\.base)*\.json"
    r"|\.cache/huggingface/.*"
)

AnyPath = str | os.PathLike[str]


def check_file(
    out: AnyPath, form: str, *, overwrite: bool = False, inputs: Iterable[AnyPath] = ()
) -> None:
    """ReapError unless a file of the format `form` may be written to `out`.

    It must not be, nor lie in, one of `inputs`, by whatever name or link. What is there is replaced
    with `overwrite` alone, and only if it is empty or has this format itself.
    """
    out = Path(out)
    if out.is_dir():
        raise ReapError(f"{out} is a folder: name a file")
    check_apart(out, inputs)
    if not out.parent.is_dir():
        raise ReapError(f"{out.absolute().parent} does not exist: create the folder first")
    if os.path.lexists(out):
        if not overwrite:
            raise ReapError(f"{out} exists: choose another name or pass overwrite=True")
        if out.exists() and not out.is_file():
            raise ReapError(f"{out} is not a regular file: choose another name")
        if out.exists() and out.stat().st_size and format_of(out) != form:
            raise ReapError(
                f"will not overwrite {out}: it is not {KINDS[form]} of ours: "
                "choose another name or remove it yourself"
            )
    _check_writable(out, out.parent)


def check_folder(out: AnyPath, *, overwrite: bool = False, inputs: Iterable[AnyPath] = ()) -> None:
    """ReapError unless a model may be written to the folder `out`.

    It must not be, hold, nor lie in one of `inputs`, by whatever name or link. A folder that is
    there is replaced with `overwrite` alone, and only if it is empty or holds a model and nothing
    that was put beside it.
    """
    out = Path(out)
    check_apart(out, inputs)
    if not os.path.lexists(out):
        above = next(folder for folder in out.absolute().parents if os.path.lexists(folder))
        _check_writable(out, above)
        return
    if not out.is_dir():
        raise ReapError(f"{out} exists and is not a folder: choose another name")
    if not overwrite:
        raise ReapError(f"{out} exists: choose another folder or pass overwrite=True")
    real = Path(os.path.realpath(out))
    for used in map(os.path.realpath, (os.path.expanduser("~"), os.curdir)):
        if Path(used).is_relative_to(real):
            raise ReapError(f"will not overwrite {out}: it holds {used}")
    if os.path.ismount(real) or (real / ".git").exists():
        raise ReapError(f"will not overwrite {out}: it is a mount point or a repository")
    foreign = _foreign(real)
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise ReapError(
            f"will not overwrite {out}: {foreign[0]}{more} is not part of a model: "
            "choose another folder or move it away"
        )
    _check_writable(out, real.parent)


def format_of(path: AnyPath) -> str | None:
    """What a file of ours calls itself; None for any other file."""
    path = Path(path)
    try:
        with open(open_regular(path), "rb") as file:
            if is_report(file.read(256)):
                return REPORT
        about = read_header(path).metadata.get("reap", "{}")
        found = parse_json(about.encode(errors="surrogatepass"), str(path)).get("format")
    except ReapError:
        try:
            found = read_json(path).get("format")
        except ReapError:
            return None
    return found if isinstance(found, str) else None


def is_report(head: bytes) -> bool:
    """Whether a file that begins so (256 bytes) is a report."""
    return head.startswith(b"<!doctype html>") and _PAGE in head


def check_apart(out: Path, inputs: Iterable[AnyPath]) -> None:
    """ReapError when `out` is, holds, or lies in one of `inputs`, by whatever name or link."""
    given = [Path(name).expanduser() for name in inputs]
    # The name itself, and what it links to.
    places = {Path(os.path.realpath(out.parent)) / out.name, Path(os.path.realpath(out))}
    for source in filter(os.path.exists, given):
        line = {_identity(path) for place in places for path in (place, *place.parents)}
        real = Path(os.path.realpath(source))
        if _identity(real) in line - {None}:
            same = any(_identity(place) == _identity(real) for place in places)
            raise ReapError(
                f"output {out} {'is' if same else 'lies in'} {source}, which is read: "
                "choose another place"
            )
        above = {_identity(path) for path in real.parents}
        if any(_identity(place) in above for place in places if place.exists()):
            raise ReapError(f"output {out} holds {source}, which is read: choose another place")
    if not out.exists():
        return
    held = {_identity(path): path for path in _files(out)}
    for source in given:
        for path in _files(source):
            if _identity(path) in held and _identity(path) is not None:
                raise ReapError(
                    f"output {out} holds {path}, which is read, as {held[_identity(path)].name}: "
                    "choose another place"
                )


def _identity(path: Path) -> tuple[int, int] | None:
    """What all names of a file or folder share; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
    for parent, _, names in os.walk(path):
        yield from (Path(parent, name) for name in names)


def _foreign(folder: Path) -> list[str]:
    """Names in it that are of no model; all of them where it holds none."""
    links = [
        str(Path(parent, name).relative_to(folder))
        for parent, folders, _ in os.walk(folder)
        for name in folders
        if Path(parent, name).is_symlink()
    ]
    names = sorted([*links, *(str(path.relative_to(folder)) for path in _files(folder))])
    recorded = _recorded(folder)
    weights = any(name.endswith(".safetensors") for name in names)
    if not recorded and not ("config.json" in names and weights):
        return names
    known = recorded | _indexed(folder)
    return [name for name in names if name not in known and not OF_A_MODEL.fullmatch(name)]


def _recorded(folder: Path) -> set[str]:
    """The files that `prune` or `merge` says it wrote here."""
    try:
        record = read_json(folder / RECORD)
    except ReapError:
        return set()
    files = record.get("files")
    if record.get("format") not in RECORDS:
        return set()
    return {RECORD, *(name for name in files or () if isinstance(name, str))}


def _indexed(folder: Path) -> set[str]:
    try:
        places = read_json(folder / "model.safetensors.index.json").get("weight_map")
    except ReapError:
        return set()
    values = places.values() if isinstance(places, dict) else ()
    return {name for name in values if str(name).endswith(".safetensors")}


def _check_writable(out: Path, above: Path) -> None:
    try:
        tempfile.NamedTemporaryFile(prefix=f".{out.name}.", suffix=".part", dir=above).close()
    except OSError as error:
        raise ReapError(f"cannot write {out}: {error.strerror}") from None
