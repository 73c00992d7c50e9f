"""Is a folder what `prune` or `merge` wrote, and what does a server need to know of it?"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap.checkpoint.operation import layout_of, operate
from reap.checkpoint.writing import Check, check_shards, checksum
from reap.errors import ReapError
from reap.files.folder import Folder, open_folder
from reap.files.outputs import MERGED, RECORD, RECORDS
from reap.files.paths import path_of
from reap.files.safefile import read_json
from reap.files.units import counted
from reap.model.config import NeedsCodeError
from reap.model.identity import describe_folder, mtp_of
from reap.model.info import ModelInfo
from reap.model.shapes import loading_problems
from reap.planning.plan import Plan


@dataclass(frozen=True)
class Verification:
    """What was found. `compared`: what the bytes were held against, None when there was nothing;
    `bytes`: how many were read. `experts`, `top_k` and `groups` are per MoE layer,
    `expert_parallel` are the numbers of ranks that share the experts of every layer evenly,
    `tensor_parallel` those that share attention heads and the inner sizes. `problems`: the
    parameters that transformers' loader misses or refuses, `ignored` those that it leaves out, and
    `unchecked` why it could not be asked. `mtp` is the prefix of the multi-token-prediction layer
    with experts, which counts as one of the layers; None without one that is known."""

    folder: Path
    compared: str | None
    bytes: int
    experts: Mapping[str, int]
    top_k: Mapping[str, int]
    groups: Mapping[str, int]
    expert_parallel: tuple[int, ...]
    tensor_parallel: tuple[int, ...]
    problems: tuple[str, ...]
    ignored: tuple[str, ...]
    unchecked: str | None
    seconds: float
    mtp: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "folder": str(self.folder)}

    def __str__(self) -> str:
        def numbers(values: Any) -> str:
            return ", ".join(map(str, sorted(set(values)))) or "unknown"

        def ranks(values: Any) -> str:
            return f"{numbers(values)} {'rank shares' if tuple(values) == (1,) else 'ranks share'}"

        told = f"the same as {self.compared}" if self.compared else "nothing to compare with"
        lines = [f"{self.folder}: {self.bytes:,} bytes read in {self.seconds:.1f} s, {told}"]
        if self.experts:
            lines.append(
                f"experts per layer: {numbers(self.experts.values())} in "
                f"{counted(len(self.experts), 'layer')}, top-k {numbers(self.top_k.values())}, "
                f"router groups {numbers(self.groups.values())}"
            )
            if self.mtp:
                lines.append(f"multi-token prediction: {self.mtp}, one of these layers")
            lines.append(f"expert parallel: {ranks(self.expert_parallel)} evenly")
        lines.append(f"tensor parallel: {ranks(self.tensor_parallel)} evenly")
        if self.ignored:
            lines.append(f"not loaded: {counted(len(self.ignored), 'tensor')}, {self.ignored[0]}")
        if self.unchecked:
            lines.append(f"not checked by transformers: {self.unchecked}")
        return "\n".join(lines)


def verify(
    folder: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> Verification:
    """Reads a model's folder back: headers, and every byte that there is something to hold against.

    That is `source`, the model that it was pruned from, or else the checksums that `prune` or
    `merge` recorded. `progress(n)` hears of n more bytes read. ReapError for the first difference,
    and for a folder that neither of them wrote.
    """
    started = time.monotonic()
    advance = progress or (lambda n: None)
    path_of(folder, "folder", "the folder of a pruned model")
    opened = open_folder(folder)
    record = record_of(opened.path)
    compared: str | None
    if source is None:
        compared, size = _recorded(opened.path, record, advance)
    else:
        path_of(source, "source", "the folder of a model")
        compared, size = str(source), _compare(opened, record, open_folder(source), advance)
    tensors = {n: (t.dtype, t.shape) for s in opened.shards for n, t in s.tensors.items()}
    unchecked, problems, info = None, set[str](), None
    try:
        problems = loading_problems(opened.config, tensors, opened.path)
        info = describe_folder(opened.path, mtp=True)
    except (NotImplementedError, ReapError) as error:
        unchecked = str(error)
    ignored = {problem for problem in problems if "not part of" in problem}
    layers = info.layers if info else ()
    return Verification(
        folder=Path(folder),
        compared=compared,
        bytes=size,
        experts={layer.name: layer.num_experts for layer in layers},
        top_k={layer.name: layer.top_k for layer in layers},
        groups={layer.name: layer.n_group for layer in layers},
        expert_parallel=_divisors(layer.num_experts for layer in layers),
        tensor_parallel=_divisors(_split_sizes(opened.config)),
        problems=tuple(sorted(problems - ignored)),
        ignored=tuple(sorted(ignored)),
        unchecked=unchecked,
        seconds=time.monotonic() - started,
        mtp=mtp_of(opened.path)[0],
    )


def record_of(folder: Path) -> dict[str, Any]:
    """What `prune` or `merge` recorded in a folder of theirs; ReapError for another."""
    if not os.path.lexists(folder / RECORD):
        raise ReapError(
            f"{folder} has no {RECORD}: it was not pruned or merged by reap, or is an incomplete "
            "copy: copy that file too (`reap info` says what the model is)"
        )
    record = read_json(folder / RECORD)
    if record.get("format") not in RECORDS:
        raise ReapError(f"{folder / RECORD} is no record of a pruned model")
    return record


def _recorded(
    folder: Path, record: Mapping[str, Any], advance: Callable[[int], None]
) -> tuple[str | None, int]:
    """Holds every file against the record: what it was, and the bytes read."""
    files = record.get("files")
    if not isinstance(files, dict) or not all(isinstance(v, dict) for v in files.values()):
        return None, 0
    done, sums = 0, 0
    for name, about in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder):
            raise ReapError(f"{folder / RECORD} names {name!r}, which is not in the folder")
        if not path.is_file():
            raise ReapError(f"{folder} lacks {name}, which was written: copy it again")
        size = path.stat().st_size
        if size != about.get("bytes"):
            raise ReapError(
                f"{path} has {size} bytes, {about.get('bytes')} were written: copy it again"
            )
        if "crc32" in about:
            read, crc = checksum(path, advance)
            done, sums = done + read, sums + 1
            if crc != about["crc32"]:
                raise ReapError(f"{path} is not what was written: its checksum differs")
    return (f"the checksums in {RECORD}" if sums else f"the sizes in {RECORD}"), done


def _compare(
    folder: Folder,
    record: Mapping[str, Any],
    source: Folder,
    advance: Callable[[int], None],
) -> int:
    """Holds the weights against those of the base model: the bytes read."""
    if record["format"] == MERGED:
        raise ReapError(
            f"{folder.path} was merged: its experts are means, of which its base has no bytes to "
            "compare: verify it without a source, by the checksums that were recorded"
        )
    try:
        kept = {name: tuple(layer["kept"]) for name, layer in record["layers"].items()}
        criterion, seed = record["criterion"], record["seed"]
        base = ModelInfo.from_json(record["base_model"])
    except (AttributeError, KeyError, TypeError) as error:
        raise ReapError(f"{folder.path / RECORD} is damaged: it lacks {error}") from error
    try:
        other = base.difference(describe_folder(source.path, like=base), to_prune=True)
    except NeedsCodeError:
        other = None  # names and shapes of its experts are compared without
    if other:
        raise ReapError(
            f"{source.path} is not the model that {folder.path} was pruned from: {other}"
        )
    operation = operate(source, Plan(model=base, criterion=criterion, seed=seed, kept=kept))
    if folder.config != operation.config:
        raise ReapError(f"{folder.path}/config.json is not what pruning {source.path} gives")
    layout = layout_of(source, operation)
    names = {path.name for path in layout}
    odd = names ^ {shard.path.name for shard in folder.shards}
    if odd:
        raise ReapError(f"{folder.path} and {source.path} differ in the file {min(odd)}")
    check = Check()
    check_shards(source, layout, folder.path, check, advance)
    return sum(size for size, _ in check.found.values())


def _split_sizes(config: Mapping[str, Any]) -> list[int]:
    """What tensor parallelism divides, as far as the config says."""
    text = config.get("text_config")
    fields = {**config, **(text if isinstance(text, dict) else {})}
    names = ("num_attention_heads", "moe_intermediate_size", "intermediate_size")
    return [fields[name] for name in names if type(fields.get(name)) is int and fields[name] > 0]


def _divisors(numbers: Any) -> tuple[int, ...]:
    common = math.gcd(*numbers)
    return tuple(n for n in range(1, min(common, 1024) + 1) if common % n == 0)
