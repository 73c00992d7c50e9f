"""What becomes of each tensor of a checkpoint when experts are removed: names and shapes in, edits
out, no file touched.

What a router is called differs between architectures: `reap.model.routers` has the table. A tensor
of a router, or one of a block that has as many rows or columns as there are experts, that is in no
table is an error, because copying it could be silently wrong.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from reap.checkpoint.blocks import Block, Shapes
from reap.checkpoint.removal import Removal
from reap.errors import ReapError
from reap.model.routers import IN_ROUTER, ROUTER, ROUTER_IN_LAYER, SHARED, TAILED, TOKEN_TABLE

# Beside the weight of a quantised router: what has a row per expert, or one for a block of rows ...
_QUANTISED = r"(gate|router)(\.(gate|wg|layer|proj|linear|classifier))?\."
ROUTER_ROWS = re.compile(_QUANTISED + r"(weight_packed|weight_scale|weight_scale_inv)")
# ... and all names: rows of the others run over inputs, or an element holds several experts.
ROUTER_QUANTISED = re.compile(
    _QUANTISED
    + r"(qweight|qzeros|scales|g_idx|biases|input_(global_)?scale"
    + r"|weight_(packed|shape|zero_point|g_idx|(global_)?scale(_\w+)?))"
)
# Where a router may lie beside the block's module: in these modules of the decoder layer, ...
ROUTER_BESIDE = ("moe",)
# Axis 0 of these runs over the rows of all experts, one expert after another (DBRX).
STACKED = re.compile(r"experts\.mlp\.(w1|v1|w2)")


@dataclass(frozen=True, slots=True)
class Edit:
    """The new name and shape of a tensor. With `rows`, seen as [outer, length, rest] it keeps
    `rows` of axis 1.

    With `experts`, its integers are expert ids: an id that is kept becomes its position there.
    With `made`, its bytes are those that this gives, the same at every call.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[int, ...] | None = None
    outer: int = 1
    length: int = 1
    experts: tuple[int, ...] | None = None
    made: Callable[[], Iterator[bytes]] | None = None


def edits_of(
    shapes: Shapes, removals: Sequence[Removal], dropped: Iterable[str]
) -> dict[str, Edit | None]:
    """Old name -> edit (None: dropped) for every tensor that changes; `dropped`: prefixes of names.

    ReapError when a tensor does not fit its block's removal, or may speak of experts and is in no
    table.
    """
    in_layer: dict[str, list[str]] = {removal.block.layer: [] for removal in removals}
    for name in shapes:
        for prefix in itertools.accumulate(name.split("."), "{}.{}".format):
            if prefix in in_layer:
                in_layer[prefix].append(name)
    edits: dict[str, Edit | None] = {}
    for removal in removals:
        edits |= _edits_of_block(removal, shapes, in_layer[removal.block.layer])
    edits |= {name: None for name in shapes for prefix in dropped if name.startswith(prefix + ".")}
    return edits


def _edits_of_block(
    removal: Removal, shapes: Shapes, names: Iterable[str]
) -> dict[str, Edit | None]:
    """`names`: the tensors of the block's decoder layer."""
    block, total = removal.block, removal.total
    edits: dict[str, Edit | None] = {**_edits_by_modality(removal, shapes)}
    routed = bool(edits)
    edits |= _edits_of_experts(removal, shapes)
    for name in names:
        if name in edits:
            continue
        shape = shapes[name][1]
        tails = ends_of(name, block)
        axis = next((a for p, a in ROUTER for tail in tails if re.fullmatch(p, tail)), None)
        if any(map(TOKEN_TABLE.fullmatch, tails)):
            edits[name] = Edit(name, shape, experts=removal.kept)
        elif axis is not None:
            tailed = removal.model_type in TAILED
            edits[name] = _along_experts(name, shape, axis, removal, tailed=tailed)
            routed = True
        elif any(map(ROUTER_ROWS.fullmatch, tails)) and shape[:1] == (total,):
            edits[name] = _along_experts(name, shape, 0, removal, tailed=False)
            routed = True
        elif name in block.fused and not any(map(SHARED.fullmatch, tails)):
            if math.prod(shape) > 1:  # a scale that all experts share stays as it is
                edits[name] = _edit_fused(name, shape, tails, removal)
        elif any(map(ROUTER_QUANTISED.fullmatch, tails)):
            one_block = shape[:1] == (1,) and total not in shape
            if math.prod(shape) == 1 or (one_block and any(map(ROUTER_ROWS.fullmatch, tails))):
                continue  # a scale that serves all rows
            raise ReapError(
                f"{name!r} with shape {list(shape)} is part of a quantised router, which cannot be "
                f"cut to single experts of {total}: give a checkpoint whose router is not quantised"
            )
        elif _depends(tails, shape, total):
            raise ReapError(
                f"do not know what {name!r} with shape {list(shape)} is, next to {total} "
                "experts: pruning it, or not, could be wrong"
            )
    if not routed:
        raise ReapError(f"{block.module} has experts but no router that we know")
    return edits


def _edits_of_experts(removal: Removal, shapes: Shapes) -> dict[str, Edit | None]:
    """Of the tensors of single experts: those that stay are numbered from 0."""
    block = removal.block
    if block.ids and block.ids != set(range(removal.total)):
        raise ReapError(
            f"{block.module} has {len(block.ids)} experts, the last is {max(block.ids)}; "
            f"the plan speaks of {removal.total}"
        )
    new_id = {old: new for new, old in enumerate(removal.kept)}
    return {
        name: Edit(f"{block.module}.experts.{new_id[old]}{rest}", shapes[name][1])
        if old in new_id
        else None
        for name, old, rest in block.experts
    }


def _edits_by_modality(removal: Removal, shapes: Shapes) -> dict[str, Edit]:
    """Of the routers of a block whose modalities have one each, and of what they share."""
    row, parts = removal.modalities, removal.kept_by_modality
    if row is None:
        return {}
    size = removal.total // len(parts)
    edits: dict[str, Edit] = {}
    for modality, ids in zip(row.each, parts, strict=True):
        name = f"{removal.block.module}.{modality.router}"
        wanted = [size if axis == modality.axis else None for axis in range(2)]
        edits[name] = _select(name, _shape_of(name, shapes, *wanted), modality.axis, ids)
    name = f"{removal.block.module}.{row.bias}"
    _shape_of(name, shapes, len(parts), size)
    kept = removal.kept  # its rows, one after another, are numbered as the experts are
    edits[name] = Edit(name, (len(parts), len(kept) // len(parts)), kept, 1, removal.total)
    return edits


def _shape_of(name: str, shapes: Shapes, *wanted: int | None) -> tuple[int, ...]:
    shape = shapes[name][1] if name in shapes else ()
    if len(shape) != len(wanted) or any(
        w not in (None, s) for s, w in zip(shape, wanted, strict=True)
    ):
        raise ReapError(
            f"{name!r} must have the shape {wanted} (None: any), it has {shape or 'no tensor'}"
        )
    return shape


def _depends(tails: list[str], shape: tuple[int, ...], total: int) -> bool:
    """Whether a tensor that no table knows looks as if it spoke of single experts."""
    if not tails or any(map(SHARED.fullmatch, tails)):
        return False
    return total in shape or (any(map(IN_ROUTER.match, tails)) and math.prod(shape) > 1)


def ends_of(name: str, block: Block) -> list[str]:
    """The ends of a name that the tables may know: after the module and after places beside it."""
    ends = []
    beside = (f"{block.layer}.{module}" for module in ROUTER_BESIDE)
    for prefix in dict.fromkeys((block.module, *beside, block.layer)):
        if name.startswith(prefix + "."):
            tail = name[len(prefix) + 1 :]
            if prefix != block.layer or ROUTER_IN_LAYER.match(tail):
                ends.append(tail)
    return ends


def _edit_fused(name: str, shape: tuple[int, ...], tails: list[str], removal: Removal) -> Edit:
    total, kept = removal.total, removal.kept
    if any(map(STACKED.fullmatch, tails)) and shape[0] % total == 0:
        return Edit(name, (shape[0] // total * len(kept), *shape[1:]), kept, 1, total)
    return _along_experts(name, shape, 0, removal, tailed=False)


def _along_experts(
    name: str, shape: tuple[int, ...], axis: int, removal: Removal, *, tailed: bool
) -> Edit:
    """Keeps the kept experts of an axis; with `tailed` also what follows the experts there."""
    length = shape[axis] if axis < len(shape) else -1
    if length < removal.total or (length > removal.total and not tailed):
        raise ReapError(
            f"{name!r} has shape {list(shape)}: axis {axis} must have one entry for each of "
            f"{removal.total} experts"
        )
    return _select(name, shape, axis, (*removal.kept, *range(removal.total, length)))


def _select(name: str, shape: tuple[int, ...], axis: int, ids: tuple[int, ...]) -> Edit:
    new = (*shape[:axis], len(ids), *shape[axis + 1 :])
    return Edit(name, new, ids, math.prod(shape[:axis]), shape[axis])
