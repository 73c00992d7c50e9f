"""Plan + model folder -> pruned model folder, straight from the files, past torch.

    report = reap.prune("Qwen3-30B-A3B", plan, "Qwen3-30B-A3B-pruned")

Everything that configuration and headers can show is checked first. Then the kept bytes are copied
into a hidden folder beside the output, verified, synced and moved into place in one step.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reap.checkpoint import card, counts
from reap.checkpoint.blocks import find_blocks
from reap.checkpoint.operation import Layout, Operation, layout_of, operate, own_tensors
from reap.checkpoint.publish import staged
from reap.checkpoint.writing import copy_others, write, write_json, write_shards
from reap.errors import ReapError
from reap.files.folder import CONFIG, Folder, open_folder
from reap.files.safefile import Tensor, span
from reap.model import compat
from reap.model.identity import describe_folder
from reap.model.info import ModelInfo
from reap.model.shapes import Tensors, loading_problems
from reap.planning.plan import Plan

MARGIN = 16 << 20  # bytes of disk left free beside the output


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did. `kept`: experts per layer name; sizes in bytes; `seconds` of wall-clock
    time.

    `unchecked` is None when transformers' own loader accepted every shape, else why it could not be
    asked. `notes`: how the folder is not quite what the plan was made from, such as its precision.
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
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "out": str(self.out), "kept": dict(self.kept)}

    def __str__(self) -> str:
        before, after = self.bytes_before / 1e9, self.bytes_after / 1e9
        lines = [
            f"{self.out}: {after:.2f} GB of weights from {before:.2f} GB in {self.seconds:.1f} s"
        ]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"config.json: {change}" for change in self.config_changes]
        lines += [
            f"dropped, no statistics exist for it: {prefix}" for prefix in self.dropped_layers
        ]
        lines += [f"not copied: {name}" for name in self.left_out]
        if self.unchecked:
            lines.append(f"shapes not checked by transformers: {self.unchecked}")
        return "\n".join(lines)


def prune(
    model_dir: str | os.PathLike[str],
    plan: Plan,
    out_dir: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    strict: bool = False,
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> PruneReport:
    """Writes `out_dir`: the model in `model_dir` with only the experts that `plan` keeps,
    renumbered from 0.

    Every dtype and quantisation survives byte for byte, and the memory used does not grow with the
    model. The folder may hold the plan's model in another precision; with `strict` that, and
    whatever else would be a note in the report, is an error. `overwrite` replaces an existing
    folder, `command` goes into reap.json, `progress(n)` hears of n more bytes written. ReapError,
    with nothing left behind and an existing `out_dir` untouched, when the folder is not a model
    with experts or not the plan's model, is damaged, or cannot be written.
    """
    started = time.monotonic()
    compat.require(compat.PRUNING)
    folder = open_folder(model_dir)
    out = _check_output(folder.path, Path(out_dir), overwrite)
    operation = _operate(folder, plan)
    found = describe_folder(folder.path, like=plan.model)
    _check_same_model(folder, plan, found)
    notes = tuple(plan.model.notes(found))
    if strict and notes:
        raise ReapError(f"{folder.path} is not strictly what the plan was made from: {notes[0]}")
    before = {n: t for shard in folder.shards for n, t in own_tensors(folder, shard)}
    layout = layout_of(folder, operation)
    parts = [part for shard in layout.values() for part in shard]
    after = {edit.name: (tensor.dtype, edit.shape) for edit, tensor in parts}
    size, others = _sizes(folder, layout)
    _check_space(out, size + others)

    def verify(stage: Path) -> None:
        _verify(open_folder(stage), operation, after)

    advance = progress or (lambda n: None)
    try:
        unchecked = _check_shapes(folder, before, operation, after)
        with staged(out, overwrite=overwrite, verify=verify) as stage:
            write_shards(folder, layout, stage, advance)
            write_json(stage / CONFIG, operation.config)
            copied = tuple(name for name in folder.others if name not in operation.rewritten)
            copy_others(replace(folder, others=copied), stage, advance)
            for name, content in operation.rewritten.items():
                write_json(stage / name, content)
                advance(os.stat(folder.path / name).st_size)
            record = card.record(folder, plan, operation, command, notes)
            write_json(stage / card.RECORD, record)
            write(stage / "README.md", card.model_card(record, out.name, size).encode())
    except OSError as error:
        raise ReapError(
            f"cannot write {out}: {error.strerror or error}; nothing was changed there"
        ) from error
    return PruneReport(
        out=out,
        bytes_before=sum(t.nbytes for t in before.values()),
        bytes_after=size,
        kept={name: len(ids) for name, ids in plan.kept.items()},
        config_changes=operation.changes,
        dropped_layers=operation.dropped_layers,
        left_out=folder.left_out,
        unchecked=unchecked,
        seconds=time.monotonic() - started,
        notes=notes,
    )


def pruned_size(model_dir: str | os.PathLike[str], plan: Plan) -> int:
    """The bytes that `prune` copies: what its `progress` adds up to. Raises what `prune` raises."""
    folder = open_folder(model_dir)
    return sum(_sizes(folder, layout_of(folder, _operate(folder, plan))))


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
            _check_same_model(folder, plan, found)
        raise


def _sizes(folder: Folder, layout: Layout) -> tuple[int, int]:
    """Bytes of the weights that stay, and of the other files."""
    parts = (part for shard in layout.values() for part in shard)
    weights = sum(span(tensor.dtype, edit.shape) for edit, tensor in parts)
    return weights, sum(os.stat(folder.path / name).st_size for name in folder.others)


def _check_output(source: Path, out_dir: Path, overwrite: bool) -> Path:
    out = Path(os.path.realpath(out_dir))
    if out == source or out.is_relative_to(source) or source.is_relative_to(out):
        raise ReapError(
            f"output {out_dir} and model {source} lie in one another: choose another folder"
        )
    if not os.path.lexists(out):
        return out
    if not os.path.isdir(out):
        raise ReapError(f"{out_dir} exists and is not a folder")
    if not overwrite:
        raise ReapError(
            f"{out_dir} exists: choose another folder or allow overwriting it (--overwrite)"
        )
    for used in map(os.path.realpath, (os.path.expanduser("~"), os.curdir)):
        if Path(used).is_relative_to(out):
            raise ReapError(f"will not overwrite {out_dir}: it holds {used}")
    if os.path.ismount(out) or (out / ".git").exists():
        raise ReapError(f"will not overwrite {out_dir}: it is a mount point or a repository")
    return out


def _check_space(out: Path, needed: int) -> None:
    place = out.parent
    while not os.path.exists(place):
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed + MARGIN:
        raise ReapError(
            f"{out} needs {needed / 1e9:.2f} GB but {place} has {free / 1e9:.2f} GB free"
            " (the old folder stays until the new one is whole)"
        )


def _check_same_model(folder: Folder, plan: Plan, found: ModelInfo) -> None:
    different = plan.model.difference(found, to_prune=True)
    if different:
        raise ReapError(f"the plan was made for another model than {folder.path}: {different}")


def _check_shapes(
    folder: Folder, before: Mapping[str, Tensor], operation: Operation, after: Tensors
) -> str | None:
    """Asks transformers' loader. Returns why it could not be asked, None when all is well."""
    try:
        problems = loading_problems(operation.config, after)
        if problems:  # what it says of the original too is not our doing
            shapes = {name: (t.dtype, t.shape) for name, t in before.items()}
            problems -= loading_problems(folder.config, shapes)
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
