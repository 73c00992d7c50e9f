"""Plan + model folder -> pruned model folder, straight from the files: no tensor passes through torch.

    report = reap.prune("Qwen3-30B-A3B", plan, "Qwen3-30B-A3B-pruned")

Everything that configuration and headers can show is checked first. Then the kept bytes are copied into a hidden
folder beside the output, verified, synced and moved into place in one step.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reap import card, counts, surgery
from reap.errors import ReapError
from reap.folder import CONFIG, INDEX, Folder, open_folder
from reap.info import ModelInfo
from reap.plan import Plan
from reap.publish import staged
from reap.safefile import (
    BITS,
    Header,
    Tensor,
    copy_range,
    encode_header,
    merged,
    open_regular,
    span,
    write_all,
)
from reap.shapes import Tensors, loading_problems

GATHER = 16 << 20  # bytes of a strided tensor held in memory at a time
TABLE_LIMIT = 256 << 20  # bytes of a table of expert ids, which is rewritten in memory
MARGIN = 16 << 20  # bytes of disk left free beside the output


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did. `kept`: experts per layer name; sizes in bytes; `seconds` of wall-clock time.

    `unchecked` is None when transformers' own loader accepted every shape, else why it could not be asked.
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

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "out": str(self.out), "kept": dict(self.kept)}

    def __str__(self) -> str:
        before, after = self.bytes_before / 1e9, self.bytes_after / 1e9
        lines = [
            f"{self.out}: {after:.2f} GB of weights from {before:.2f} GB in {self.seconds:.1f} s"
        ]
        lines += [f"config.json: {change}" for change in self.config_changes]
        lines += [
            f"dropped, no statistics exist for it: {prefix}" for prefix in self.dropped_layers
        ]
        lines += [f"not copied: {name}" for name in self.left_out]
        if self.unchecked:
            lines.append(f"shapes not checked by transformers: {self.unchecked}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Operation:
    """All that will change: edits by old tensor name (None: dropped; absent: as it is) and the new config."""

    edits: Mapping[str, surgery.Edit | None]
    config: dict[str, Any]
    changes: tuple[str, ...]
    dropped_layers: tuple[str, ...]
    kept: Mapping[str, int]  # experts in the file, by block


def check_folder(path: str | os.PathLike[str]) -> Folder:
    """The folder's config, index and headers, checked; ReapError says what is wrong. No tensor is read."""
    return open_folder(path)


def prune(
    model_dir: str | os.PathLike[str],
    plan: Plan,
    out_dir: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> PruneReport:
    """Writes `out_dir`: the model in `model_dir` with only the experts that `plan` keeps, renumbered from 0.

    Every dtype and quantisation survives byte for byte, and the memory used does not grow with the model.
    `overwrite` replaces an existing folder, `command` goes into reap.json, `progress(n)` hears of n more bytes
    written. ReapError, with nothing left behind and an existing `out_dir` untouched, when the folder is not a
    model with experts or not the plan's model, is damaged, or cannot be written.
    """
    started = time.monotonic()
    folder = open_folder(model_dir)
    out = _check_output(folder.path, Path(out_dir), overwrite)
    operation = operate(folder, plan)
    _check_same_model(folder, plan)
    before = {n: t for shard in folder.shards for n, t in _own(folder, shard)}
    after = {edit.name: (t.dtype, edit.shape) for _, edit, t in _outputs(folder, operation)}
    size = sum(span(dtype, shape) for dtype, shape in after.values())
    others = sum(os.stat(folder.path / name).st_size for name in folder.others)
    _check_space(out, size + others)
    unchecked: list[str | None] = []

    def verify(stage: Path) -> None:
        verified = open_folder(stage)
        _verify_tensors(verified, operation, after)
        unchecked.append(_verify_shapes(folder, before, stage, after))

    def advance(n: int) -> None:
        if progress is not None:
            progress(n)

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with staged(out, overwrite=overwrite, verify=verify) as stage:
            _write_shards(folder, operation, stage, size, advance)
            _write_json(stage / CONFIG, operation.config)
            _copy_others(folder, stage, advance)
            record = card.record(folder, plan, operation, command)
            _write_json(stage / card.RECORD, record)
            _write(stage / "README.md", card.model_card(record, out.name, size).encode())
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
        unchecked=unchecked[0],
        seconds=time.monotonic() - started,
    )


def _check_output(source: Path, out_dir: Path, overwrite: bool) -> Path:
    out = Path(os.path.realpath(out_dir))
    if out == source or out.is_relative_to(source) or source.is_relative_to(out):
        raise ReapError(
            f"output {out_dir} and model {source} lie in one another: choose another folder"
        )
    if not os.path.lexists(out):
        return out
    if not out.is_dir():
        raise ReapError(f"{out_dir} exists and is not a folder")
    if not overwrite:
        raise ReapError(
            f"{out_dir} exists: choose another folder or allow overwriting it (--overwrite)"
        )
    for used in (Path.home(), Path.cwd()):
        if used.is_relative_to(out):
            raise ReapError(f"will not overwrite {out_dir}: it holds {used}")
    if os.path.ismount(out) or (out / ".git").exists():
        raise ReapError(f"will not overwrite {out_dir}: it is a mount point or a repository")
    return out


def _check_space(out: Path, needed: int) -> None:
    place = out.parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed + MARGIN:
        raise ReapError(
            f"{out} needs {needed / 1e9:.2f} GB but {place} has {free / 1e9:.2f} GB free"
            " (the old folder stays until the new one is whole)"
        )


def _check_same_model(folder: Folder, plan: Plan) -> None:
    from reap.models import describe_folder

    found: ModelInfo = describe_folder(folder.path)
    different = plan.model.difference(found)
    if different:
        raise ReapError(f"the plan was made for another model than {folder.path}: {different}")


def operate(folder: Folder, plan: Plan) -> Operation:
    """Decides what becomes of every tensor and of the config, from names, shapes and the plan alone."""
    shapes = {n: (t.dtype, t.shape) for shard in folder.shards for n, t in _own(folder, shard)}
    blocks = surgery.find_blocks(shapes)
    if not blocks:
        raise ReapError(f"{folder.path} is a dense model: it has no experts to remove")
    chosen = _layers_of_blocks(plan, blocks)
    counted = _count_places(folder.config, plan, blocks, chosen)
    stacks = {blocks[module].stack for module in chosen}
    depths = [counts.depth_of(folder.config, place.path) for place in counted]
    dropped = _extra_layers(folder.config, blocks, chosen, stacks, depths, set(counted))
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
    if "quantization_config" in config:
        config["quantization_config"] = counts.renumbered(config["quantization_config"], kept)
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
    """Fills in what the plan keeps of `block`. Several layers may share it: tied ones, or text and vision."""
    kept = [plan.kept[name] for name in layers]
    block.total = plan.model.layer(layers[0]).num_experts
    vision = [name for name in layers if "vision_moe" in name]
    if vision or f"{block.module}.gate.weight_1" in shapes:
        if len(layers) != 2 or len(vision) != 1 or len(kept[0]) != len(kept[1]):
            raise ReapError(
                f"{block.module} holds text and vision experts under one count: the plan must speak of"
                " both and keep equally many"
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
                    f"{CONFIG} does not say that {name} has {info.num_experts} experts ({', '.join(counts.KEYS)})"
                )
            for place in places:
                found.setdefault(place, {})[number] = len(plan.kept[name])
    return found


def _extra_layers(
    config: Mapping[str, Any],
    blocks: Mapping[str, surgery.Block],
    chosen: Mapping[str, list[str]],
    stacks: set[str],
    depths: list[int | None],
    counted: set[counts.Place],
) -> set[str]:
    """Prefixes to drop: multi-token-prediction layers with experts. Other experts must be counted elsewhere."""
    depth = next((d for d in depths if d is not None), None)
    dropped = set()
    for module, block in blocks.items():
        if module in chosen:
            continue
        prefix = surgery.extra_prefix(block, stacks, depth)
        if prefix is not None:
            dropped.add(prefix)
        elif _shares_count(config, module, block, counted):
            raise ReapError(
                f"{module} has experts that the plan does not speak of, counted by the same number"
            )
    return dropped


def _shares_count(
    config: Mapping[str, Any], module: str, block: surgery.Block, counted: set[counts.Place]
) -> bool:
    total = len({number for number, _ in block.experts.values()})
    places = counts.places_of(config, module, block.number, total) if total else []
    return not places or bool(counted & set(places))


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


def _own(folder: Folder, shard: Header) -> Iterator[tuple[str, Tensor]]:
    """A shard's tensors, without those that the index places in another shard."""
    places = folder.index["weight_map"] if folder.index else {}
    for name, tensor in shard.tensors.items():
        if places.get(name, shard.path.name) == shard.path.name:
            yield name, tensor


def _outputs(folder: Folder, operation: Operation) -> Iterator[tuple[Header, surgery.Edit, Tensor]]:
    for shard in folder.shards:
        for name, tensor in _own(folder, shard):
            edit = operation.edits.get(name, surgery.Edit(name, tensor.shape))
            if edit is not None:
                yield shard, edit, tensor


def _write_shards(
    folder: Folder, operation: Operation, stage: Path, size: int, progress: Callable[[int], None]
) -> None:
    weight_map: dict[str, str] = {}
    by_shard: dict[Path, list[tuple[surgery.Edit, Tensor]]] = {}
    for shard, edit, tensor in _outputs(folder, operation):
        if weight_map.setdefault(edit.name, shard.path.name) != shard.path.name:
            raise ReapError(
                f"two shards hold {edit.name!r}: {weight_map[edit.name]} and {shard.path.name}"
            )
        by_shard.setdefault(shard.path, []).append((edit, tensor))
    headers = {shard.path: shard for shard in folder.shards}
    for path, parts in by_shard.items():
        # Wide elements first, as the library writes them, so that every tensor stays aligned.
        parts.sort(key=lambda part: -BITS[part[1].dtype])
        _write_shard(headers[path], parts, stage / path.name, progress)
    if folder.index is not None:
        metadata = dict(folder.index.get("metadata") or {})
        metadata["total_size"] = size
        if "total_parameters" in metadata:
            metadata["total_parameters"] = sum(
                math.prod(edit.shape) for parts in by_shard.values() for edit, _ in parts
            )
        index = {
            **folder.index,
            "metadata": metadata,
            "weight_map": dict(sorted(weight_map.items())),
        }
        _write_json(stage / INDEX, index)


def _write_shard(
    shard: Header,
    parts: list[tuple[surgery.Edit, Tensor]],
    path: Path,
    progress: Callable[[int], None],
) -> None:
    source = open_regular(shard.path)
    try:
        before = os.fstat(source)
        if before.st_size != shard.size:
            raise ReapError(f"{shard.path} changed while it was read")
        target = _create(path)
        try:
            tensors = {edit.name: (tensor.dtype, edit.shape) for edit, tensor in parts}
            write_all(target, encode_header(tensors, shard.metadata))
            pending: list[tuple[int, int]] = []
            for edit, tensor in parts:
                ranges = _ranges(edit, tensor, shard.data)
                if ranges is not None:
                    pending.extend(ranges)
                    continue
                _copy(source, pending, target, progress)
                pending = []
                for block in _gathered(source, edit, tensor, shard.data):
                    write_all(target, block)
                    progress(len(block))
            _copy(source, pending, target, progress)
        finally:
            os.close(target)
        now = os.fstat(source)
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise ReapError(f"{shard.path} changed while it was read")
    finally:
        os.close(source)


def _copy(
    source: int, ranges: list[tuple[int, int]], target: int, progress: Callable[[int], None]
) -> None:
    for offset, length in merged(iter(ranges)):
        copy_range(source, offset, length, target, progress)


def _ranges(edit: surgery.Edit, tensor: Tensor, data: int) -> list[tuple[int, int]] | None:
    """The file ranges that make up the new tensor, or None when it must be gathered in memory."""
    start = data + tensor.start
    if edit.experts is not None or (edit.rows is not None and edit.outer > 1):
        return None
    if edit.rows is None:
        return [(start, tensor.nbytes)]
    row = tensor.nbytes // edit.length
    return [(start + i * row, row) for i in edit.rows]


def _gathered(source: int, edit: surgery.Edit, tensor: Tensor, data: int) -> Iterator[memoryview]:
    start = data + tensor.start
    if edit.experts is not None:
        table = np.frombuffer(
            _pread(source, tensor.nbytes, start), dtype=f"<i{BITS[tensor.dtype] // 8}"
        )
        yield memoryview(surgery.remapped(table.reshape(tensor.shape), edit.experts)).cast("B")
        return
    assert edit.rows is not None
    wide = tensor.nbytes // edit.outer
    step = max(1, GATHER // max(1, wide))
    for first in range(0, edit.outer, step):
        count = min(step, edit.outer - first)
        raw = np.frombuffer(_pread(source, count * wide, start + first * wide), dtype=np.uint8)
        rows = raw.reshape(count, edit.length, -1)[:, list(edit.rows)]
        yield memoryview(np.ascontiguousarray(rows)).cast("B")


def _pread(fd: int, length: int, offset: int) -> bytes:
    data = os.pread(fd, length, offset)
    if len(data) != length:
        raise ReapError(
            f"a file became shorter while it was read: wanted {length} bytes, got {len(data)}"
        )
    return data


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _write(path: Path, data: bytes) -> None:
    fd = _create(path)
    try:
        write_all(fd, data)
    finally:
        os.close(fd)


def _write_json(path: Path, value: Any) -> None:
    _write(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _copy_others(folder: Folder, stage: Path, progress: Callable[[int], None]) -> None:
    for name in folder.others:
        target = stage / card.CARRIED_AS.get(name, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        source = open_regular(folder.read_from(name))
        try:
            fd = _create(target)
            try:
                copy_range(source, 0, os.fstat(source).st_size, fd, progress)
            finally:
                os.close(fd)
        finally:
            os.close(source)


def _verify_tensors(written: Folder, operation: Operation, expected: Tensors) -> None:
    """The written headers hold what was meant, experts are numbered from 0, and the config is the new one."""
    found = {n: (t.dtype, t.shape) for shard in written.shards for n, t in shard.tensors.items()}
    if found != expected:
        odd = next(n for n in {**found, **expected} if found.get(n) != expected.get(n))
        raise ReapError(
            f"verification failed: {odd!r} is {found.get(odd)}, it must be {expected.get(odd)}"
        )
    if written.config != operation.config:
        raise ReapError("verification failed: config.json is not what was written")
    for module, block in surgery.find_blocks(found).items():
        ids = {number for number, _ in block.experts.values()}
        if module in operation.kept and ids and ids != set(range(operation.kept[module])):
            raise ReapError(f"verification failed: {module} has the experts {sorted(ids)[:8]}...")


def _verify_shapes(
    source: Folder, before: Mapping[str, Tensor], stage: Path, after: Tensors
) -> str | None:
    """Asks transformers' loader, on the meta device. Returns why it could not be asked, None when all is well."""
    try:
        old = loading_problems(source.path, {n: (t.dtype, t.shape) for n, t in before.items()})
        new = loading_problems(stage, after)
    except NotImplementedError as error:
        return str(error)
    worse = sorted(new - old)
    if worse:
        raise ReapError(
            f"verification failed: the pruned files do not fit the pruned config: {worse[0]}"
        )
    return None
