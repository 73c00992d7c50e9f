"""What becomes of each tensor of a checkpoint when experts are removed: names and shapes in, edits
out, no file touched.

Checkpoints do not name their tensors as transformers names its modules, so experts are found by
structure. A *block* is a module with tensors under `experts.` (one per expert, or one for all with
the experts along axis 0); a layer of the plan belongs to the block with the same layer number and
the most similar path. What a router is called differs between architectures: `ROUTER` is the table.
A tensor of a router, or one of a block that has as many rows or columns as there are experts, that
is in no table is an error, because copying it could be silently wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from reap.errors import ReapError

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]  # tensor name -> dtype, shape

# Names after the block's module (or after the decoder layer) whose given axis runs over the
# experts.
ROUTER: tuple[tuple[str, int], ...] = (
    (r"(gate|router)(\.(gate|wg|layer|proj|linear|classifier))?\.(weight|bias)", 0),
    (r"gate_weight|router_bias", 0),
    (
        r"((gate|router|experts)\.)?(e_score_correction_bias|expert_biase?s?|per_expert_scale|balancing_biases)",
        0,
    ),
    (r"(gate\.)?moe_statics\.e_score_correction_bias", 1),
    (r"gate\.router_mlp\.out_proj\.(weight|bias)", 0),
)
# The experts lie along axis 0 of these too, although no part of the name is `experts`.
FUSED = re.compile(
    r"(?P<module>.+\.block_sparse_moe)\.(input_linear|output_linear)\.\w+"
    r"|(?P<other>.+\.moe)\.(gate_proj|up_proj|down_proj)\.\w+"
)
# DBRX: axis 0 of these runs over the rows of all experts, one expert after another.
STACKED = re.compile(r"experts\.mlp\.(w1|v1|w2)")
# Parts of a block that hold nothing per routed expert, whatever their sizes.
SHARED = re.compile(
    r"(shared?_(experts?|mlp|expert_gate)|fc[12]_latent_proj|(pre|post)_expert_norm|experts\.post_expert_norm"
    r"|.*norm|router\.scale|gate\.down_proj|gate\.router_mlp|gate\.router_states_scale)(\..*)?"
)
# Of a decoder layer's own children, those that may belong to a block which is not a module of its
# own.
BESIDE = re.compile(r"(gate|router|experts|expert_bias|e_score_correction_bias)(\.|$)")
# Routers with rows after those of the routed experts (a skip class, shared experts): these stay, at
# the end.
TAILED = {"zaya", "inkling_mm_model", "inkling_text", "longcat_flash"}
PER_EXPERT = re.compile(r"(?P<module>.+?)\.experts\.(?P<id>\d+)(?P<rest>\..+)?")
IN_EXPERTS = re.compile(r"(?P<module>.+?)\.experts\.(?P<rest>\D.*)")
LAYER = re.compile(r"(.*\.)?(\d+)(?=\.|$)")  # a module's prefix up to its layer number
MTP = re.compile(r"mtp|nextn")
TOKEN_TABLE = r"gate\.tid2eid"  # DeepSeek-V4's hash layers: token -> expert ids


@dataclass(frozen=True)
class Edit:
    """The new name and shape of a tensor. With `rows`, seen as [outer, length, rest] it keeps
    `rows` of axis 1.

    With `experts`, its integers are expert ids: an id that is kept becomes its position there.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[int, ...] | None = None
    outer: int = 1
    length: int = 1
    experts: tuple[int, ...] | None = None


@dataclass
class Block:
    """A MoE block: `module` ends before `.experts`, `layer` after its layer number."""

    module: str
    layer: str
    number: int
    experts: dict[str, tuple[int, str]] = field(
        default_factory=dict
    )  # tensor -> expert id, rest of the name
    fused: set[str] = field(default_factory=set)
    kept: tuple[int, ...] = ()  # ids in the file
    total: int = 0

    @property
    def parts(self) -> list[str]:
        return self.module.split(".")

    @property
    def stack(self) -> str:
        """The prefix that all layers of this block's stack share, e.g. `model.layers`."""
        return self.layer.rpartition(".")[0]


def find_blocks(names: Iterable[str]) -> dict[str, Block]:
    """The MoE blocks of a checkpoint by module name."""
    blocks: dict[str, Block] = {}
    for name in names:
        each = PER_EXPERT.fullmatch(name)
        whole = None if each else (FUSED.fullmatch(name) or IN_EXPERTS.fullmatch(name))
        match = each or whole
        if match is None:
            continue
        module = next(v for v in (match["module"], match.groupdict().get("other")) if v)
        if module not in blocks:
            place = LAYER.match(module)
            if place is None:
                raise ReapError(
                    f"cannot tell the layer of the experts of {module!r}: no number in the name"
                )
            blocks[module] = Block(module, place[0], int(place[2]))
        if each:
            blocks[module].experts[name] = (int(each["id"]), each["rest"] or "")
        else:
            blocks[module].fused.add(name)
    return blocks


def experts_in(block: Block, shapes: Shapes) -> int:
    """The number of experts of a block, as its tensors show it."""
    each = {number for number, _ in block.experts.values()}
    return len(each) or max((shapes[name][1] or (0,))[0] for name in block.fused)


def extra_prefix(block: Block, stacks: set[str], depth: int | None) -> str | None:
    """The prefix of a multi-token-prediction layer, which transformers never runs; None when
    `block` is not in one.

    They are called so, or number on after the `depth` layers of a stack (`stacks`: the stacks of
    the plan).
    """
    for i, part in enumerate(block.parts):
        if MTP.match(part):
            return ".".join(block.parts[: i + 1])
    if depth is not None and block.stack in stacks and block.number >= depth:
        return block.layer
    return None


def resolve(layer: str, blocks: Mapping[str, Block]) -> Block:
    """The block of the plan's layer `layer`, the path of an experts module in transformers."""
    parts = layer.split(".")
    number = max((i for i, part in enumerate(parts) if part.isdigit()), default=None)
    if number is None:
        raise ReapError(f"cannot tell which layer {layer!r} of the plan is: no number in the name")

    def likeness(block: Block) -> tuple[bool, int]:
        stack = block.stack.rpartition(".")[2] == parts[number - 1]
        return stack, len(set(parts) & set(block.parts))

    found = [
        b
        for b in blocks.values()
        if b.number == int(parts[number]) and not any(MTP.match(part) for part in b.parts)
    ]
    if not found:
        raise ReapError(f"the checkpoint has no experts for layer {layer!r} of the plan")
    best = max(likeness(b) for b in found)
    winners = [b for b in found if likeness(b) == best]
    if len(winners) > 1:
        names = " and ".join(repr(b.module) for b in winners[:2])
        raise ReapError(
            f"layer {layer!r} of the plan could be {names} in the checkpoint: ambiguous"
        )
    return winners[0]


def edit_block(
    block: Block, shapes: Shapes, names: Iterable[str], model_type: str, known: Mapping[str, Edit]
) -> dict[str, Edit | None]:
    """Old name -> edit (None: dropped) for every tensor of one block that changes, `known` ones
    included.

    `names` are the tensors of the block's decoder layer. ReapError when anything does not fit the
    plan.
    """
    edits: dict[str, Edit | None] = dict(known)
    place = {old: new for new, old in enumerate(block.kept)}
    ids = {number for number, _ in block.experts.values()}
    if ids and ids != set(range(block.total)):
        raise ReapError(
            f"{block.module} has {len(ids)} experts, the last is {max(ids)}; "
            f"the plan speaks of {block.total}"
        )
    for name, (number, rest) in block.experts.items():
        shape = shapes[name][1]
        new = place.get(number)
        edits[name] = None if new is None else Edit(f"{block.module}.experts.{new}{rest}", shape)
    routed = bool(known)
    for name in names:
        if name in edits:
            continue
        shape = shapes[name][1]
        tails = _tails(name, block)
        axis = next((a for p, a in ROUTER for tail in tails if re.fullmatch(p, tail)), None)
        if any(re.fullmatch(TOKEN_TABLE, tail) for tail in tails):
            edits[name] = Edit(name, shape, experts=block.kept)
        elif axis is not None:
            edits[name] = _select(name, shape, axis, block, tail=model_type in TAILED)
            routed = True
        elif name in block.fused and not any(SHARED.fullmatch(t) for t in tails):
            if math.prod(shape) > 1:  # a scale that all experts share stays as it is
                edits[name] = _select_fused(name, shape, tails, block)
        elif _depends(tails, shape, block.total):
            raise ReapError(
                f"do not know what {name!r} with shape {list(shape)} is, next to {block.total} "
                "experts: pruning it, or not, could be wrong"
            )
    if not routed:
        raise ReapError(f"{block.module} has experts but no router that we know")
    return edits


def _depends(tails: list[str], shape: tuple[int, ...], total: int) -> bool:
    """Whether a tensor that no table knows looks as if it spoke of single experts."""
    if not tails or any(SHARED.fullmatch(tail) for tail in tails):
        return False
    routes = any(re.match(r"(gate|router)\.", tail) for tail in tails)
    return total in shape or (routes and math.prod(shape) > 1)


def _tails(name: str, block: Block) -> list[str]:
    """What follows the module, or the layer for parts of a router that lie beside the module."""
    tails = []
    for prefix in dict.fromkeys((block.module, f"{block.layer}.moe", block.layer)):
        if name.startswith(prefix + "."):
            tail = name[len(prefix) + 1 :]
            if prefix != block.layer or BESIDE.match(tail):
                tails.append(tail)
    return tails


def _select(name: str, shape: tuple[int, ...], axis: int, block: Block, tail: bool) -> Edit:
    length = shape[axis] if axis < len(shape) else -1
    if length < block.total or (length > block.total and not tail):
        raise ReapError(
            f"{name!r} has shape {list(shape)}: axis {axis} must have one entry for each of "
            f"{block.total} experts"
        )
    rows = (*block.kept, *range(block.total, length))
    new = (*shape[:axis], len(rows), *shape[axis + 1 :])
    return Edit(name, new, rows, math.prod(shape[:axis]), length)


def _select_fused(name: str, shape: tuple[int, ...], tails: list[str], block: Block) -> Edit:
    if any(map(STACKED.fullmatch, tails)) and shape[0] % block.total == 0:
        size = shape[0] // block.total * len(block.kept)
        return Edit(name, (size, *shape[1:]), block.kept, 1, block.total)
    return _select(name, shape, 0, block, tail=False)


def edit_modalities(
    block: Block, shapes: Shapes, text: tuple[int, ...], vision: tuple[int, ...]
) -> dict[str, Edit]:
    """ERNIE-VL's routers: text experts 0..E-1 and vision experts E..2E-1 share a block, each has
    its router [H, E].

    `text` and `vision` number from 0 within their modality and keep equally many. Sets `block.kept`
    for the experts themselves, which `edit_block` numbers in one sequence.
    """
    half = block.total // 2
    block.kept = (*text, *(half + i for i in vision))
    edits: dict[str, Edit] = {}
    for tail, rows in (("gate.weight", text), ("gate.weight_1", vision)):
        name = f"{block.module}.{tail}"
        hidden = _shape_of(name, shapes, (None, half))[0]
        edits[name] = Edit(name, (hidden, len(rows)), rows, hidden, half)
    name = f"{block.module}.moe_statics.e_score_correction_bias"
    _shape_of(name, shapes, (2, half))
    edits[name] = Edit(name, (2, len(text)), block.kept, 1, 2 * half)
    return edits


def _shape_of(name: str, shapes: Shapes, wanted: tuple[int | None, ...]) -> tuple[int, ...]:
    shape = shapes[name][1] if name in shapes else ()
    if len(shape) != len(wanted) or any(
        w not in (None, s) for s, w in zip(shape, wanted, strict=True)
    ):
        raise ReapError(
            f"{name!r} must have the shape {wanted} (None: any), it has {shape or 'no tensor'}"
        )
    return shape


def remapped(table: np.ndarray, kept: tuple[int, ...]) -> np.ndarray:
    """A table [tokens, K] of expert ids with the kept experts' new numbers.

    Hash routing has no runner-up: a slot whose expert is gone goes to a kept one that the token
    does not have yet, chosen by token number so that the orphaned tokens spread evenly.
    """
    place = np.full(int(max(table.max(initial=0), max(kept))) + 1, -1, dtype=table.dtype)
    place[list(kept)] = np.arange(len(kept))
    new = place[table]
    for row in np.flatnonzero((new < 0).any(axis=1)):
        free = np.setdiff1d(np.arange(len(kept)), new[row])
        gone = np.flatnonzero(new[row] < 0)
        new[row, gone] = np.roll(free, -(row % len(free)))[: len(gone)]
    return new
