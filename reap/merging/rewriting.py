"""Merge + model folder -> merged folder, straight from the files.

    report = reap.merge("Qwen3-30B-A3B", "merge.json", "Qwen3-30B-A3B-merged")

The means are written once to a hidden file beside the output; then the shards are written, each
merged expert a copy of its group's mean and everything else a copy of the original's bytes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from reap.checkpoint import card
from reap.checkpoint.guards import agreed, check_space, new_folder, recorded_files
from reap.checkpoint.operation import Layout, Operation, layout_of, own_tensors
from reap.checkpoint.removal import MtpLayers
from reap.checkpoint.writing import Check, copy_others, write_json, write_shards, write_text
from reap.errors import ReapError
from reap.files.folder import CONFIG, Folder, open_folder
from reap.files.outputs import MERGED, RECORD, check_folder
from reap.files.paths import path_of
from reap.files.safefile import Tensor
from reap.files.units import sized
from reap.merging import mergecard
from reap.merging.blending import Blending, blending_of, edits_of, write_means
from reap.merging.mergeplan import Merge
from reap.model import compat

MEANS = ".means"  # behind the name of the hidden folder that the output is made in


@dataclass(frozen=True)
class MergeReport:
    """What `merge` did. `left`: different experts per layer name; `bytes`: of the weights, as many
    as the original has; `merged_bytes`: of those that are means now.

    `verify_seconds` is what threads spent reading back; None where it was not asked for.
    `notes`: how the folder is not quite what the merge was made from, such as its precision.
    """

    out: Path
    bytes: int
    merged_bytes: int
    left: Mapping[str, int]
    left_out: tuple[str, ...]
    seconds: float
    verify_seconds: float | None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "out": str(self.out), "left": dict(self.left)}

    def __str__(self) -> str:
        lines = [
            f"{self.out}: {sized(self.bytes)} of weights in {self.seconds:.1f} s, "
            f"{sized(self.merged_bytes)} of them means",
            "as large as the original: its routers choose among all experts, and those of a group "
            "are copies",
        ]
        if self.verify_seconds is None:
            lines.append("not verified: `reap verify` reads it back")
        else:
            lines.append(f"read back and as it was meant: {self.verify_seconds:.1f} s")
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"not copied: {name}" for name in self.left_out]
        return "\n".join(lines)


class _Ready(NamedTuple):
    """A merge that may begin. `size` and `others`: bytes of weights and of other files."""

    folder: Folder
    out: Path
    blending: Blending
    stored: Mapping[str, Tensor]
    size: int
    others: int
    notes: tuple[str, ...]


def merge(
    model_dir: str | os.PathLike[str],
    merge: Merge | str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    verify: bool = True,
    strict: bool = False,
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> MergeReport:
    """Writes `out_dir`: the model in `model_dir` with the experts of each group of `merge` equal.

    It loads wherever the original does, and is as large: a token's gates of merged experts add up
    because the router still has an output for each, which fewer rows of a router could not say.
    This is how published merging baselines are evaluated. Means are computed in fp32 (of F32
    weights in fp64) and rounded once to the stored type; everything else has the original's bytes.
    `reap verify` holds the folder against the checksums recorded.

    Memory does not grow with the model; beside the output, its means lie on the disk once more
    while it is written. The options are those of `prune`. ReapError, with nothing left behind and
    an existing `out_dir` untouched, when the folder is not the merge's model, holds experts that
    are quantised or differ in shape, is damaged, or cannot be written.
    """
    started = time.monotonic()
    compat.require(compat.PRUNING)
    for name, given in (("model_dir", model_dir), ("out_dir", out_dir)):
        path_of(given, name, "a folder: merging works on the files of a model")
    plan = Merge.of(merge)
    ready = _prepared(model_dir, plan, out_dir, overwrite, strict)
    check = Check() if verify else None
    _write(ready, plan, overwrite, check, command, progress or (lambda n: None))
    return MergeReport(
        out=ready.out,
        bytes=ready.size,
        merged_bytes=sum(
            ready.blending.blends[part].length
            for parts in ready.blending.tensors.values()
            for part in parts
            if isinstance(part, int)
        ),
        left=plan.left,
        left_out=ready.folder.left_out,
        seconds=time.monotonic() - started,
        verify_seconds=sum(check.times) if check else None,
        notes=ready.notes,
    )


def check_merge(
    model_dir: str | os.PathLike[str],
    plan: Merge,
    out_dir: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    strict: bool = False,
) -> int:
    """Everything that `merge` checks before it writes, with its errors. The bytes that it will
    write: what its `progress` adds up to."""
    ready = _prepared(model_dir, plan, out_dir, overwrite, strict)
    return ready.size + ready.others + ready.blending.size


def _prepared(
    model_dir: str | os.PathLike[str],
    plan: Merge,
    out_dir: str | os.PathLike[str],
    overwrite: bool,
    strict: bool,
) -> _Ready:
    folder = open_folder(model_dir)
    check_folder(out_dir, overwrite=overwrite, inputs=[folder.path])
    out = Path(os.path.realpath(out_dir))
    if not any(len(group.experts) > 1 for groups in plan.groups.values() for group in groups):
        raise ReapError(
            f"the merge joins no experts: {out_dir} would be a copy of {model_dir}: ask for fewer "
            "groups"
        )
    folder = replace(folder, others=(CONFIG, *folder.others))  # it is copied like them
    notes = agreed(folder, plan.model, "merge", strict=strict)
    blending = blending_of(folder, plan)
    stored = {n: t for shard in folder.shards for n, t in own_tensors(folder, shard)}
    size = sum(tensor.nbytes for tensor in stored.values())
    others = sum(os.stat(folder.path / name).st_size for name in folder.others)
    check_space(out, size + others + blending.size)
    return _Ready(folder, out, blending, stored, size, others, notes)


def _write(
    ready: _Ready,
    plan: Merge,
    overwrite: bool,
    check: Check | None,
    command: str | None,
    advance: Callable[[int], None],
) -> None:
    folder, out = ready.folder, ready.out
    with new_folder(out, folder, overwrite=overwrite) as stage:
        means = stage / MEANS
        try:
            write_means(ready.blending, means, advance)
            layout = _layout(ready, means)
            write_shards(folder, layout, stage, advance, check)
        finally:
            means.unlink(missing_ok=True)
        copy_others(folder, stage, advance, check)
        record = _record(ready, plan, command)
        write_text(stage / "README.md", mergecard.model_card(record, out.name, ready.size))
        write_json(stage / RECORD, {**record, "files": recorded_files(stage, check)})


def _layout(ready: _Ready, means: Path) -> Layout:
    edits = edits_of(ready.blending, ready.stored, means)
    config = dict(ready.folder.config)
    return layout_of(ready.folder, Operation((), edits, config, (), MtpLayers((), ()), {}))


def _record(ready: _Ready, plan: Merge, command: str | None) -> dict[str, Any]:
    """The content of reap.json: everything needed to see, check and repeat what was done."""
    return {
        "format": MERGED,
        "version": 1,
        "base_model": plan.model.to_json(),
        "base_model_name": card.base_name(ready.folder),
        "method": plan.method,
        "options": dict(plan.options),
        "calibration": dict(plan.calibration),
        "layers": {
            layer.name: {
                "experts": layer.num_experts,
                "groups": [
                    {"experts": list(group.experts), "weights": list(group.weights)}
                    for group in plan.groups[layer.name]
                ],
            }
            for layer in plan.model.layers
        },
        "left_out": list(ready.folder.left_out),
        "notes": list(ready.notes),
        "command": command,
        "versions": card.installed_versions(),
    }
