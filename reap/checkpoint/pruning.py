"""Plan + model folder -> pruned model folder, straight from the files, past torch.

    report = reap.prune("Qwen3-30B-A3B", plan, "Qwen3-30B-A3B-pruned")

Everything that configuration and headers can show is checked first. Then the kept bytes are copied
into a hidden folder beside the output, verified, synced and moved into place in one step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from reap.checkpoint import card, counts
from reap.checkpoint.blocks import find_blocks
from reap.checkpoint.guards import (
    agreed,
    check_same_model,
    check_space,
    new_folder,
    recorded_files,
)
from reap.checkpoint.operation import Layout, Operation, layout_of, operate, own_tensors
from reap.checkpoint.writing import (
    Check,
    copy_others,
    write_json,
    write_shards,
    write_text,
)
from reap.errors import ReapError
from reap.files.folder import CONFIG, Folder, open_folder
from reap.files.outputs import RECORD, check_folder
from reap.files.paths import path_of
from reap.files.safefile import Tensor, span
from reap.files.units import sized
from reap.model import compat
from reap.model.identity import describe_folder, mtp_of
from reap.model.shapes import Tensors, loading_problems
from reap.model.uneven import counts_in
from reap.planning.plan import Plan


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did. `kept`: experts per layer name; sizes in bytes; `seconds` of wall-clock
    time.

    `unchecked` is None when transformers' own loader accepted every shape, else why it could not be
    asked. `verify_seconds` is what threads spent reading back, while others wrote; None where it
    was not asked for. `mtp_layers` are prefixes of multi-token-prediction layers that are pruned
    like the others, `dropped_layers` of those that are gone, and `why_dropped` what it takes to
    keep them. `notes`: how the folder is not quite what the plan was made from, such as its
    precision.
    """

    out: Path
    bytes_before: int
    bytes_after: int
    kept: Mapping[str, int]
    config_changes: tuple[str, ...]
    dropped_layers: tuple[str, ...]
    left_out: tuple[str, ...]
    unchecked: str | None
    seconds: float
    verify_seconds: float | None
    notes: tuple[str, ...] = ()
    mtp_layers: tuple[str, ...] = ()
    why_dropped: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "out": str(self.out), "kept": dict(self.kept)}

    def __str__(self) -> str:
        before, after = sized(self.bytes_before), sized(self.bytes_after)
        lines = [f"{self.out}: {after} of weights from {before} in {self.seconds:.1f} s"]
        if self.bytes_after == self.bytes_before:
            lines.append("the plan drops no expert: this is a copy")
        if self.verify_seconds is None:
            lines.append("not verified: `reap verify` reads it back")
        else:
            lines.append(f"read back and the same as the original: {self.verify_seconds:.1f} s")
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"config.json: {change}" for change in self.config_changes]
        lines += [f"multi-token prediction is kept: {prefix}" for prefix in self.mtp_layers]
        lines += [
            f"dropped, no statistics exist for it: {prefix} ({self.why_dropped})"
            for prefix in self.dropped_layers
        ]
        lines += [f"not copied: {name}" for name in self.left_out]
        if self.unchecked:
            lines.append(f"shapes not checked by transformers: {self.unchecked}")
        return "\n".join(lines)


def prune(
    model_dir: str | os.PathLike[str],
    plan: Plan | str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    verify: bool = True,
    allow_copy: bool = False,
    strict: bool = False,
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> PruneReport:
    """Writes `out_dir`: the model in `model_dir` with only the experts that `plan` keeps,
    renumbered from 0. `plan` may be the file of one.

    Every dtype and quantisation survives byte for byte, and the memory used does not grow with the
    model. The folder may hold the plan's model in another precision; with `strict` that, and
    whatever else would be a note in the report, is an error. `overwrite` replaces a folder that
    holds a model and nothing else, `command` goes into reap.json, `progress(n)` hears of n more
    bytes written. Unless `verify` is False, every file is read back from the disk, held against the
    original, and its checksum recorded. ReapError, with nothing left behind and an existing
    `out_dir` untouched, when the folder is not a model with experts or not the plan's model, is
    damaged, or cannot be written, and unless `allow_copy` is set when the plan drops nothing.
    """
    started = time.monotonic()
    compat.require(compat.PRUNING)
    for name, given in (("model_dir", model_dir), ("out_dir", out_dir)):
        path_of(given, name, "a folder: pruning works on the files of a model")
    if not isinstance(plan, Plan):
        plan = Plan.load(plan)
    ready = _prepared(model_dir, plan, out_dir, overwrite, allow_copy, strict)
    folder, operation, layout, after = ready.folder, ready.operation, ready.layout, ready.after
    out, size, notes = ready.out, ready.size, ready.notes

    def accept(stage: Path) -> None:
        _verify(open_folder(stage), operation, after)

    advance = progress or (lambda n: None)
    check = Check() if verify else None
    with new_folder(out, folder, overwrite=overwrite, verify=accept) as stage:
        write_shards(folder, layout, stage, advance, check)
        write_json(stage / CONFIG, operation.config)
        copied = tuple(name for name in folder.others if name not in operation.rewritten)
        copy_others(replace(folder, others=copied), stage, advance, check)
        for name, content in operation.rewritten.items():
            write_json(stage / name, content)
            advance(os.stat(folder.path / name).st_size)
        record = card.record(folder, plan, operation, command, notes)
        write_text(stage / "README.md", card.model_card(record, out.name, size))
        write_json(stage / RECORD, {**record, "files": recorded_files(stage, check)})
    return PruneReport(
        out=out,
        bytes_before=ready.bytes_before,
        bytes_after=size,
        kept={name: len(ids) for name, ids in plan.kept.items()},
        config_changes=operation.changes,
        dropped_layers=operation.mtp.dropped,
        left_out=folder.left_out,
        unchecked=ready.unchecked,
        seconds=time.monotonic() - started,
        verify_seconds=sum(check.times) if check else None,
        notes=notes,
        mtp_layers=operation.mtp.kept,
        why_dropped=_why_dropped(folder) if operation.mtp.dropped else None,
    )


def _why_dropped(folder: Folder) -> str:
    """What it takes to keep the multi-token-prediction layer of which the plan does not speak."""
    known, reason = mtp_of(folder.path)
    if known:
        return "a plan of statistics with it, as `reap calibrate` makes them, keeps it"
    return reason.partition(": ")[2] if reason else "it is not known how to run it"


def check_prune(
    model_dir: str | os.PathLike[str],
    plan: Plan,
    out_dir: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    allow_copy: bool = False,
    strict: bool = False,
) -> int:
    """Everything that `prune` checks before it writes, with its errors. The bytes that it will
    copy: what its `progress` adds up to."""
    ready = _prepared(model_dir, plan, out_dir, overwrite, allow_copy, strict)
    return ready.size + ready.others


class _Prepared(NamedTuple):
    """A pruning that may begin. `after`: data types and shapes to be; `size` and `others`: bytes of
    weights and of other files."""

    folder: Folder
    out: Path
    operation: Operation
    layout: Layout
    after: Tensors
    bytes_before: int
    size: int
    others: int
    notes: tuple[str, ...]
    unchecked: str | None


def _prepared(
    model_dir: str | os.PathLike[str],
    plan: Plan,
    out_dir: str | os.PathLike[str],
    overwrite: bool,
    allow_copy: bool,
    strict: bool,
) -> _Prepared:
    folder = open_folder(model_dir)
    check_folder(out_dir, overwrite=overwrite, inputs=[folder.path])
    out = Path(os.path.realpath(out_dir))
    if not allow_copy and not any(plan.dropped.values()):
        raise ReapError(
            f"the plan drops no expert: {out_dir} would be a copy of {model_dir}: plan for fewer "
            "experts, or pass allow_copy=True"
        )
    operation = _operate(folder, plan)
    notes = agreed(folder, plan.model, "plan", strict=strict)
    before = {n: t for shard in folder.shards for n, t in own_tensors(folder, shard)}
    layout = layout_of(folder, operation)
    after = {
        edit.name: (tensor.dtype, edit.shape) for shard in layout.values() for edit, tensor in shard
    }
    size, others = _sizes(folder, layout)
    check_space(out, size + others)
    unchecked = _check_shapes(folder, before, operation, after)
    if unchecked and counts_in(operation.config):
        raise ReapError(
            f"{folder.path} can only be written with one number of experts for all layers, since "
            f"transformers cannot build it here ({unchecked}): make a uniform plan (scope layer)"
        )
    bytes_before = sum(t.nbytes for t in before.values())
    return _Prepared(
        folder, out, operation, layout, after, bytes_before, size, others, notes, unchecked
    )


def _operate(folder: Folder, plan: Plan) -> Operation:
    """`operate`; where it fails because the folder is another model's, the error says so."""
    try:
        return operate(folder, plan)
    except ReapError as error:
        try:
            found = describe_folder(folder.path, like=plan.model)
        except ReapError:
            raise error from None
        # A config that counts no experts makes the layers of a model with the default number.
        counted = next(counts.places(folder.config), None) is not None
        told = counted and plan.model.layers != found.layers
        if told or plan.model.model_type != found.model_type:
            check_same_model(folder, plan.model, found, "plan")
        raise


def _sizes(folder: Folder, layout: Layout) -> tuple[int, int]:
    """Bytes of the weights that stay, and of the other files."""
    parts = (part for shard in layout.values() for part in shard)
    weights = sum(span(tensor.dtype, edit.shape) for edit, tensor in parts)
    return weights, sum(os.stat(folder.path / name).st_size for name in folder.others)


def _check_shapes(
    folder: Folder, before: Mapping[str, Tensor], operation: Operation, after: Tensors
) -> str | None:
    """Asks transformers' loader. Returns why it could not be asked, None when all is well."""
    try:
        problems = loading_problems(operation.config, after, folder.path)
        if problems:  # what it says of the original too is not our doing
            shapes = {name: (t.dtype, t.shape) for name, t in before.items()}
            problems -= loading_problems(folder.config, shapes, folder.path)
    except NotImplementedError as error:
        return str(error)
    if problems:
        raise ReapError(f"cannot prune {folder.path}: afterwards {min(problems)}")
    return None


def _verify(written: Folder, operation: Operation, expected: Tensors) -> None:
    """The written headers hold what was meant, experts number from 0, the config is the new one."""
    found = {n: (t.dtype, t.shape) for shard in written.shards for n, t in shard.tensors.items()}
    if found != expected:
        odd = next(n for n in {**found, **expected} if found.get(n) != expected.get(n))
        raise ReapError(
            f"verification failed: {odd!r} is {found.get(odd)}, it must be {expected.get(odd)}"
        )
    if written.config != operation.config:
        raise ReapError("verification failed: config.json is not what was written")
    kept = {removal.block.module: len(removal.kept) for removal in operation.removals}
    for module, block in find_blocks(found).items():
        ids = block.ids
        if module in kept and ids and ids != set(range(kept[module])):
            raise ReapError(f"verification failed: {module} has the experts {sorted(ids)[:8]}...")
