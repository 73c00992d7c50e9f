"""What a plan changes in a model folder, decided from names, shapes and the config alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap.checkpoint import counts, surgery
from reap.errors import ReapError
from reap.files.folder import CONFIG, Folder
from reap.files.safefile import BITS, Header, Tensor, span
from reap.model.config import EXPERT_COUNT_KEYS
from reap.planning.plan import Plan

# Shard of the original -> what it holds afterwards, in the order of the data.
Layout = dict[Path, list[tuple[surgery.Edit, Tensor]]]

TABLE_LIMIT = 256 << 20  # bytes of a table of expert ids, which is rewritten in memory


@dataclass(frozen=True)
class Operation:
    """Edits by old tensor name (None: dropped; absent: as it is) and the new config."""

    edits: Mapping[str, surgery.Edit | None]
    config: dict[str, Any]
    changes: tuple[str, ...]
    dropped_layers: tuple[str, ...]
    kept: Mapping[str, int]  # experts in the file, by block


def operate(folder: Folder, plan: Plan) -> Operation:
    """Decides what becomes of every tensor and of the config."""
    shapes = {
        n: (t.dtype, t.shape) for shard in folder.shards for n, t in own_tensors(folder, shard)
    }
    blocks = surgery.find_blocks(shapes)
    if not blocks:
        raise ReapError(f"{folder.path} is a dense model: it has no experts to remove")
    chosen = _layers_of_blocks(plan, blocks)
    counted = _count_places(folder.config, plan, blocks, chosen)
    dropped = _extra_layers(folder.config, shapes, blocks, set(chosen), set(counted))
    model_type = plan.model.model_type
    by_layer: dict[str, list[str]] = {blocks[module].layer: [] for module in chosen}
    for name in shapes:
        for layer in itertools.accumulate(name.split("."), "{}.{}".format):
            if layer in by_layer:
                by_layer[layer].append(name)
    edits: dict[str, surgery.Edit | None] = {}
    for module, layers in chosen.items():
        block = blocks[module]
        known = _set_kept(block, layers, plan, shapes)
        edits |= surgery.edit_block(block, shapes, by_layer[block.layer], model_type, known)
    edits |= {name: None for name in shapes for prefix in dropped if name.startswith(prefix + ".")}
    for name, edit in edits.items():
        _check_edit(name, shapes[name], edit)
    config, changes = counts.with_fewer(folder.config, counted, bool(dropped))
    kept = {module: blocks[module].kept for module in chosen}
    config = counts.with_quantisation(config, kept)
    sizes = {module: len(ids) for module, ids in kept.items()}
    return Operation(edits, config, tuple(changes), tuple(sorted(dropped)), sizes)


def _layers_of_blocks(plan: Plan, blocks: Mapping[str, surgery.Block]) -> dict[str, list[str]]:
    chosen: dict[str, list[str]] = {}
    for layer in plan.model.layers:
        chosen.setdefault(surgery.resolve(layer.name, blocks).module, []).append(layer.name)
    return chosen


def _set_kept(
    block: surgery.Block, layers: list[str], plan: Plan, shapes: surgery.Shapes
) -> dict[str, surgery.Edit]:
    """Fills in what the plan keeps of `block`, which tied or text and vision layers share."""
    kept = [plan.kept[name] for name in layers]
    block.total = plan.model.layer(layers[0]).num_experts
    vision = [name for name in layers if "vision_moe" in name]
    if vision or f"{block.module}.gate.weight_1" in shapes:
        if len(layers) != 2 or len(vision) != 1 or len(kept[0]) != len(kept[1]):
            raise ReapError(
                f"{block.module} holds text and vision experts under one count: "
                "the plan must speak of both and keep equally many"
            )
        block.total *= 2
        at = layers.index(vision[0])
        return surgery.edit_modalities(block, shapes, kept[1 - at], kept[at])
    if any(ids != kept[0] for ids in kept):
        raise ReapError(
            f"{layers[0]} and {layers[1]} share their weights: the plan must keep the same experts"
        )
    block.kept = kept[0]
    return {}


def _count_places(
    config: Mapping[str, Any],
    plan: Plan,
    blocks: Mapping[str, surgery.Block],
    chosen: Mapping[str, list[str]],
) -> dict[counts.Place, dict[int, int]]:
    found: dict[counts.Place, dict[int, int]] = {}
    for module, layers in chosen.items():
        for name in layers:
            info = plan.model.layer(name)
            number = blocks[module].number
            places = counts.places_of(config, f"{name}.{module}", number, info.num_experts)
            if not places:
                raise ReapError(
                    f"{CONFIG} does not say that {name} has {info.num_experts} experts "
                    f"({', '.join(EXPERT_COUNT_KEYS)})"
                )
            for place in places:
                found.setdefault(place, {})[number] = len(plan.kept[name])
    return found


def _extra_layers(
    config: Mapping[str, Any],
    shapes: surgery.Shapes,
    blocks: Mapping[str, surgery.Block],
    chosen: set[str],
    counted: set[counts.Place],
) -> set[str]:
    """Prefixes of multi-token-prediction layers with experts, to be dropped.

    ReapError for other blocks that are not `chosen`, if a `counted` number speaks of them too.
    """
    stacks = {blocks[module].stack for module in chosen}
    depths = (counts.depth_of(config, place.path) for place in counted)
    depth = next((d for d in depths if d is not None), None)
    dropped = set()
    for module, block in blocks.items():
        if module in chosen:
            continue
        prefix = surgery.extra_prefix(block, stacks, depth)
        if prefix is not None:
            dropped.add(prefix)
            continue
        total = surgery.experts_in(block, shapes)
        places = counts.places_of(config, module, block.number, total)
        if not places or counted & set(places):
            raise ReapError(
                f"{module} has experts that the plan does not speak of, counted by the same number"
            )
    return dropped


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
    places = folder.index["weight_map"] if folder.index else {}
    for name, tensor in shard.tensors.items():
        if places.get(name, shard.path.name) == shard.path.name:
            yield name, tensor


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
