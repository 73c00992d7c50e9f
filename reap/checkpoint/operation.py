"""What a plan changes in a model folder, decided from names, shapes and the config alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap.checkpoint import counts, quantisation, surgery
from reap.checkpoint.blocks import Shapes, find_blocks
from reap.checkpoint.removal import MtpLayers, Removal, kept_by_place, mtp_layers, removals_of
from reap.errors import ReapError
from reap.files.folder import CONFIG, Folder
from reap.files.garbage import uncollected
from reap.files.safefile import BITS, Header, Tensor, read_json, span
from reap.model import uneven
from reap.model.uneven import restored
from reap.planning.plan import Plan

# Shard of the original -> what it holds afterwards, in the order of the data.
Layout = dict[Path, list[tuple[surgery.Edit, Tensor]]]

CONFIG_LIMIT = 64 << 20  # bytes of a quantiser's file
TABLE_LIMIT = 256 << 20  # bytes of a table of expert ids, which is rewritten in memory


@dataclass(frozen=True)
class Operation:
    """`removals` and what follows from them: edits by old tensor name (None: dropped; absent: as it
    is), the new config, its `changes` as lines of text, what becomes of multi-token-prediction
    layers, and other files (JSON) with new content."""

    removals: tuple[Removal, ...]
    edits: Mapping[str, surgery.Edit | None]
    config: dict[str, Any]
    changes: tuple[str, ...]
    mtp: MtpLayers
    rewritten: Mapping[str, Any]


@uncollected()
def operate(folder: Folder, plan: Plan) -> Operation:
    """Decides what becomes of every tensor and of the config.

    ReapError when the folder is not a model with experts, or it and the plan do not fit.
    """
    shapes = {
        n: (t.dtype, t.shape) for shard in folder.shards for n, t in own_tensors(folder, shard)
    }
    blocks = find_blocks(shapes)
    if not blocks:
        raise ReapError(f"{folder.path} {_without_experts(folder, shapes)}")
    before = restored(folder.config)
    removals = removals_of(plan, before, shapes, blocks)
    mtp = mtp_layers(before, shapes, blocks, removals)
    edits = surgery.edits_of(shapes, removals, mtp.dropped)
    for name, edit in edits.items():
        _check_edit(name, shapes[name], edit)
    config, changes = _config(before, plan, removals, mtp)
    renaming = quantisation.Renaming.of(removals, shapes, edits)
    renamed = renaming.config(config)
    if renamed != config:
        changes.append("quantisation: what names experts names those that stay")
    return Operation(removals, edits, renamed, tuple(changes), mtp, _rewritten(folder, renaming))


def _config(
    before: dict[str, Any], plan: Plan, removals: Sequence[Removal], mtp: MtpLayers
) -> tuple[dict[str, Any], list[str]]:
    """The new config, and what changed in it: in our own words where the architecture's cannot say
    it. ReapError for what these cannot say either."""
    by_place = kept_by_place(removals)
    config, changes = counts.with_fewer(before, by_place, bool(mtp.dropped))
    places = [
        (*place.path, place.key)
        for place, kept in by_place.items()
        if counts.is_uneven(before, place, kept)
    ]
    if not places:
        return uneven.written(config, {}, ()), changes
    in_mtp = [one for one in removals if one.block.module.startswith(mtp.kept)] if mtp.kept else []
    of_mtp = {layer for removal in in_mtp for layer in removal.layers}
    found = {name: len(kept) for name, kept in plan.kept.items() if name not in of_mtp}
    most = max(found.values())
    if any(removal.modalities for removal in removals):
        raise ReapError(
            "layers with text and vision experts under one count must keep equally many: make a "
            "uniform plan (scope layer)"
        )
    for name in of_mtp:
        if len(plan.kept[name]) != most:
            raise ReapError(
                f"{name} is a multi-token-prediction layer and must keep as many experts as the "
                f"largest layer, {most}, not {len(plan.kept[name])}: plan from statistics without "
                "it (calibrate with --no-mtp), or make a uniform plan (scope layer)"
            )
    new = uneven.written(config, found, places)
    fewest = min(found.values())
    changes += [
        f"{uneven.KEY}: {fewest} to {most} experts in {len(found)} layers",
        f"model_type: {before.get('model_type')} -> {uneven.MODEL_TYPE}, for reap.load_model",
    ]
    return new, changes


def _without_experts(folder: Folder, shapes: Shapes) -> str:
    """Why no experts were found: there are none, or they go by names of another program."""

    def axes(name: str) -> int:
        return len(shapes[name][1])

    found = (counts.at(folder.config, (*p.path, p.key)) for p in counts.places(folder.config))
    count = next((n[0] if isinstance(n, list) else n for n in found), None)
    # What holds all experts has more axes than their router, which has an entry for each as well.
    like = max((name for name in shapes if count in shapes[name][1]), key=axes, default=None)
    if like is None:
        return "is a dense model: it has no experts to remove"
    formats = {shard.metadata.get("format") for shard in folder.shards}
    mlx = "mlx" in formats or any(".switch_mlp." in name for name in shapes)
    return (
        f"counts {count} experts in {CONFIG}, but no tensor is named as experts are in "
        f"transformers' format ({like!r} may be theirs{', as MLX names them' if mlx else ''}): "
        "give the checkpoint that it was converted from"
    )


def _rewritten(folder: Folder, renaming: quantisation.Renaming) -> dict[str, Any]:
    """The quantisers' own files that say something else of the experts that stay."""
    found = {}
    for name in filter(quantisation.SIDE_FILE.fullmatch, folder.others):
        value = read_json(folder.read_from(name), limit=CONFIG_LIMIT)
        new = renaming.tree(value, name)
        if new != value:
            found[name] = new
    return found


def _check_edit(name: str, tensor: tuple[str, tuple[int, ...]], edit: surgery.Edit | None) -> None:
    dtype, shape = tensor
    if edit is None:
        return
    if edit.rows is not None:
        row = math.prod(shape) * BITS[dtype] // max(1, edit.outer * edit.length)
        if row % 8:
            raise ReapError(
                f"{name!r} of {dtype} packs several experts into one byte: not supported"
            )
    if edit.experts is not None and (
        dtype not in ("I32", "I64") or span(dtype, shape) > TABLE_LIMIT
    ):
        raise ReapError(
            f"{name!r} of {dtype} {list(shape)} is not a table of expert ids that we can rewrite"
        )


def own_tensors(folder: Folder, shard: Header) -> Iterator[tuple[str, Tensor]]:
    """A shard's tensors, without those that the index places in another shard."""
    for name, tensor in shard.tensors.items():
        if folder.placed.get(name, shard.path.name) == shard.path.name:
            yield name, tensor


@uncollected()
def layout_of(folder: Folder, operation: Operation) -> Layout:
    """The tensors of every shard that has any left. ReapError when two would have one name."""
    homes: dict[str, str] = {}
    layout: Layout = {}
    for shard in folder.shards:
        for name, tensor in own_tensors(folder, shard):
            edit = operation.edits.get(name, surgery.Edit(name, tensor.shape))
            if edit is None:
                continue
            home = homes.setdefault(edit.name, shard.path.name)
            if home != shard.path.name:
                raise ReapError(f"two shards hold {edit.name!r}: {home} and {shard.path.name}")
            layout.setdefault(shard.path, []).append((edit, tensor))
    for parts in layout.values():
        # Wide elements first, as the library writes them, so that every tensor stays aligned.
        parts.sort(key=lambda part: -BITS[part[1].dtype])
    return layout
