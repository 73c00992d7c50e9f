"""What a pruned or merged folder says of how it was evaluated: in its card and its record."""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reap.checkpoint.card import installed_versions
from reap.checkpoint.composition import cell, sources_of
from reap.errors import ReapError
from reap.files.atomic import discard_unfinished, write_file
from reap.files.lock import Lock
from reap.files.outputs import RECORD, RECORDS
from reap.files.paths import path_of
from reap.files.safefile import read_json
from reap.files.units import counted

CARD = "README.md"
BEGIN, END = "<!-- reap evaluate -->\n", "<!-- end of reap evaluate -->\n"
_SECTION = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
_BEFORE = re.compile(r"^## Use$", re.MULTILINE)


def check_recordable(folder: str | os.PathLike[str]) -> None:
    """ReapError unless `folder` is one that `prune` or `merge` wrote, with its card, and can be
    written to."""
    path = path_of(folder, "folder", "the folder of a pruned model")
    _read(path)
    if not os.access(path, os.W_OK):
        raise ReapError(f"cannot write {path}: no permission")


def record_evaluation(folder: str | os.PathLike[str], evaluation: Mapping[str, Any]) -> None:
    """Writes an evaluation into the folder's README.md, as its section "Evaluation", and into its
    reap.json, in the place of an earlier one. The rest of both stays as it is.

    `evaluation` is JSON: "results", {domain: measures} of `Evaluation.to_json`, each perhaps with
    "generation" and "teacher_generation" (`Generation.to_json`), that of "total" perhaps with
    "tasks" and "teacher_tasks" (`Tasks.run`); "against", the name of the teacher; "text"
    (`Batches.describe`); "generation", how texts were generated; "command". Numbers that are not
    finite become null.

    Whenever it is stopped, `reap verify` accepts the folder: while the card is replaced the record
    has no checksum of it. ReapError where the folder is no such folder or cannot be written."""
    path = path_of(folder, "folder", "the folder of a pruned model").resolve()
    lock = Lock(path / RECORD)
    try:
        for name in (CARD, RECORD):
            discard_unfinished(path / name)
        record, card = _read(path)
        told = {**_finite(evaluation), "versions": installed_versions()}
        written = _with_section(card, _section(told)).encode(errors="backslashreplace")
        record["evaluation"] = told
        files = record.get("files")
        if isinstance(files, dict) and files.pop(CARD, None) is not None:
            _write(path / RECORD, _json(record))
        _write(path / CARD, written)
        if isinstance(files, dict):
            summed = any("crc32" in about for about in files.values() if isinstance(about, dict))
            sums = {"crc32": zlib.crc32(written)} if summed else {}
            files[CARD] = {"bytes": len(written), **sums}
        _write(path / RECORD, _json(record))
    finally:
        lock.release()


def said(evaluation: Any) -> str:
    """What a record's evaluation measured, on one line."""
    try:
        return "; ".join(_said(evaluation["results"]))
    except (AttributeError, KeyError, TypeError, ValueError):
        return "damaged"


def _said(results: Mapping[str, Any]) -> Iterator[str]:
    for name, row in results.items():
        if "loss" in row:
            kl = row.get("kl")
            original = f", the original's {_number(row.get('teacher_loss'))}, KL {_number(kl)}"
            yield f"{name} loss {_number(row['loss'])}{'' if kl is None else original}"
        if "generation" in row:
            one = row["generation"]
            yield f"{name} {counted(one['texts'], 'text')}, loop {_share(one['looped_share'])}"
    for task, row in results.get("total", {}).get("tasks", {}).items():
        yield from (f"{task} {measure} {with_error(row, measure)}" for measure in measures_of(row))


def _read(folder: Path) -> tuple[dict[str, Any], str]:
    """Record and card."""
    if not (folder / RECORD).is_file():
        raise ReapError(f"{folder} has no {RECORD}: only what reap pruned or merged has a card")
    record = read_json(folder / RECORD)
    if record.get("format") not in RECORDS:
        raise ReapError(f"{folder / RECORD} is no record of a pruned model")
    try:
        return record, (folder / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReapError(f"cannot read {folder / CARD}, the card: {error}") from error


def _write(path: Path, content: bytes) -> None:
    write_file(path, content, overwrite=True)


def _json(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_section(card: str, section: str) -> str:
    """A card with the section in the place of an old one, or before how the model is used."""
    if _SECTION.search(card):
        return _SECTION.sub(lambda _: section, card, count=1)
    use = _BEFORE.search(card)
    place = use.start() if use else len(card)
    gap = "" if card[:place].endswith("\n\n") else "\n"
    return card[:place] + gap + section + "\n" + card[place:]


def _section(told: Mapping[str, Any]) -> str:
    results = told["results"]
    lines = ["## Evaluation", ""]
    for part in (_losses, _texts, _tasks):
        found = list(part(told, results))
        lines += [*found, ""] if found else []
    if told.get("command"):
        lines += [f"Measured by {cell(told['command'])}.", ""]
    return BEGIN + "\n".join(lines) + END


def _losses(told: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[str]:
    measured = {name: row for name, row in results.items() if "loss" in row}
    if not measured:
        return
    text, against = told.get("text"), told.get("against")
    yield f"On {sources_of(text if isinstance(text, dict) else {})}, in nats per token"
    yield f"(the original is {cell(against)}):" if against else "(not compared with the original):"
    yield ""
    columns = ["domain", "tokens", "loss", "perplexity"]
    if against:
        columns += ["original's loss", "KL from the original", "same first choice"]
    yield from _head(columns)
    for name, row in measured.items():
        cells = [cell(name), f"{row['tokens']:,}", *(_number(row[k]) for k in columns[2:4])]
        if against:
            cells += [_number(row.get("teacher_loss")), _number(row.get("kl"))]
            cells += [_percent(row.get("agreement"))]
        yield _row(cells)


def _texts(told: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[str]:
    how = told.get("generation")
    if not isinstance(how, dict):
        return
    drawn = how.get("temperature")
    way = "the likeliest" if drawn is None else f"drawn at temperature {drawn} (seed {how['seed']})"
    yield f"Text, {way}, of at most {how['new_tokens']} tokens behind the first"
    yield f"{how['prompt_tokens']} of n rows of that text. Shares of n with Wilson's 95% interval;"
    yield "a text loops if it ends in at least four times the same 1 to 32 tokens, 24 or more."
    yield ""
    columns = ["model", "domain", "n", "loop", "end", "reach the limit", "different 4-grams"]
    yield from _head(columns)
    for who, key in (("original", "teacher_generation"), ("this model", "generation")):
        for name, row in results.items():
            one = row.get(key)
            if isinstance(one, dict):
                shares = [_share(one[f"{what}_share"]) for what in ("looped", "ended", "at_limit")]
                cells = [who, cell(name), f"{one['texts']:,}", *shares, _percent(one["distinct"])]
                yield _row(cells)


def _tasks(told: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[str]:
    total = results.get("total", {})
    tasks, theirs = total.get("tasks"), total.get("teacher_tasks") or {}
    if not tasks:
        return
    how = told.get("tasks", {})
    some = f", at most {how['limit']} questions of each" if how.get("limit") else ""
    yield f"Tasks of lm-evaluation-harness {how.get('lm_eval')}{some}:"
    yield ""
    yield from _head(
        ["task", "measure", "questions", *(["original"] if theirs else []), "this model"]
    )
    for name, row in tasks.items():
        for measure in measures_of(row):
            both = [theirs.get(name, {}), row] if theirs else [row]
            values = [with_error(one, measure) for one in both]
            yield _row([cell(name), cell(measure), f"{row.get('samples', '')}", *values])


def measures_of(row: Mapping[str, Any]) -> list[str]:
    """Of a task's, those that are neither errors of others nor counts."""
    return [name for name in row if "," in name and "_stderr," not in name]


def with_error(row: Mapping[str, Any], measure: str) -> str:
    """A measure of a task, such as "acc,none", with its standard error where it has one."""
    what, _, way = measure.partition(",")
    error = row.get(f"{what}_stderr,{way}")
    more = "" if error is None else f" ± {error:.4f}"
    return _number(row.get(measure)) + more


def _share(value: Mapping[str, Any]) -> str:
    return f"{value['share']:.1%} ({value['low']:.1%} to {value['high']:.1%})"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4f}"


def _percent(value: Any) -> str:
    return "" if value is None else f"{value:.1%}"


def _head(columns: list[str]) -> Iterator[str]:
    yield _row(columns)
    yield "|" + "---|" * len(columns)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
