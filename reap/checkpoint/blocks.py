"""The blocks of experts in a checkpoint, found in the names and shapes of its tensors.

Checkpoints do not name their tensors as transformers names its modules, so experts are found by
structure. A *block* is a module with tensors under `experts.`: one per expert, or one for all of
them. A layer of the plan belongs to the block with the same layer number and the most similar path.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from reap.errors import ReapError
from reap.model.mtp import MTP

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]  # tensor name -> dtype, shape

# A tensor of one expert, or the expert itself.
PER_EXPERT = re.compile(r"(?P<module>.+?)\.experts\.(?P<id>\d+)(?P<rest>\..+)?")
# A tensor of all experts, which lie along its axis 0. The first row that fits is taken.
FUSED = (
    re.compile(r"(?P<module>.+\.block_sparse_moe)\.(input_linear|output_linear)\.\w+"),
    re.compile(r"(?P<module>.+\.moe)\.(gate_proj|up_proj|down_proj)\.\w+"),
    re.compile(r"(?P<module>.+?)\.experts\.\D.*"),
)
LAYER = re.compile(r"(.*\.)?(\d+)(?=\.|$)")  # a module's prefix up to its layer number


class ExpertTensor(NamedTuple):
    """A tensor of one expert: `rest` is what follows `<module>.experts.<id>` in its name."""

    name: str
    id: int
    rest: str


@dataclass(frozen=True)
class Block:
    """A block as it is in the file.

    `module` is its path up to `.experts`, `layer` that path up to the layer `number`. `experts` are
    the tensors of single experts, `fused` the names of those that hold all.
    """

    module: str
    layer: str
    number: int
    experts: tuple[ExpertTensor, ...]
    fused: frozenset[str]

    @property
    def ids(self) -> frozenset[int]:
        """The experts that have tensors of their own."""
        return frozenset(tensor.id for tensor in self.experts)

    @property
    def parts(self) -> list[str]:
        return self.module.split(".")

    @property
    def named_mtp(self) -> bool:
        """Whether it is called a part of a multi-token-prediction layer."""
        return any(map(MTP.match, self.parts))

    @property
    def stack(self) -> str:
        """The prefix that all layers of this block's stack share, e.g. `model.layers`."""
        return self.layer.rpartition(".")[0]


def find_blocks(names: Iterable[str]) -> dict[str, Block]:
    """The blocks by module, in the order of `names`. ReapError for one without a layer number."""
    found: dict[str, tuple[list[ExpertTensor], list[str]]] = {}
    for name in names:
        each = PER_EXPERT.fullmatch(name)
        match = each or next(filter(None, (row.fullmatch(name) for row in FUSED)), None)
        if match is None:
            continue
        experts, fused = found.setdefault(match["module"], ([], []))
        if each:
            rest = sys.intern(each["rest"] or "")
            experts.append(ExpertTensor(name, int(each["id"]), rest))
        else:
            fused.append(name)
    return {module: _block(module, *tensors) for module, tensors in found.items()}


def _block(module: str, experts: list[ExpertTensor], fused: list[str]) -> Block:
    place = LAYER.match(module)
    if place is None:
        raise ReapError(
            f"cannot tell the layer of the experts of {module!r}: no number in the name"
        )
    return Block(module, place[0], int(place[2]), tuple(experts), frozenset(fused))


def experts_in(block: Block, shapes: Shapes) -> int:
    """The number of experts of a block, as its tensors show it."""
    return len(block.ids) or max((shapes[name][1] or (0,))[0] for name in block.fused)


def extra_prefix(block: Block, stacks: Collection[str], depth: int | None) -> str | None:
    """The prefix of a multi-token-prediction layer; None when `block` is not in one.

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
    """The block of the plan's layer `layer`, the path of an experts module in transformers.

    ReapError when there is none, or two that are equally like it.
    """
    parts = layer.split(".")
    number = max((i for i, part in enumerate(parts) if part.isdigit()), default=None)
    if number is None:
        raise ReapError(f"cannot tell which layer {layer!r} of the plan is: no number in the name")

    def likeness(block: Block) -> tuple[bool, int]:
        stack = block.stack.rpartition(".")[2] == parts[number - 1]
        return stack, len(set(parts) & set(block.parts))

    named_mtp = any(map(MTP.match, parts))
    found = [
        b for b in blocks.values() if b.number == int(parts[number]) and b.named_mtp == named_mtp
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
