"""What a plan does to each block of a checkpoint: one `Removal`, built here and nowhere else.

Tensors, the config and the check of what was written are all read off the same removals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reap.checkpoint import counts
from reap.checkpoint.blocks import Block, Shapes, experts_in, extra_prefix, resolve
from reap.errors import ReapError
from reap.files.folder import CONFIG
from reap.model.config import EXPERT_COUNT_KEYS
from reap.model.info import LayerInfo
from reap.model.uneven import counts_in
from reap.planning.plan import Plan


@dataclass(frozen=True)
class Modality:
    """Some experts of a block: `name` for people, `word` in the names of the plan's layers.

    `router` follows the block's module in the name of their router, a matrix whose `axis` runs over
    them.
    """

    name: str
    word: str
    router: str
    axis: int


@dataclass(frozen=True)
class Modalities:
    """A block of two modalities with equally many experts each, numbered one after another.

    The plan and the config count within a modality. The last one's router tells such a block from
    others. `bias` is a tensor [modalities, experts of each].
    """

    each: tuple[Modality, Modality]
    bias: str

    def index(self, layer: str) -> int:
        """Which modality a layer of the plan is: the last whose word is in its name, else the
        first."""
        return max((i for i, one in enumerate(self.each) if one.word in layer), default=0)

    def __str__(self) -> str:
        return " and ".join(modality.name for modality in self.each)


MODALITIES = (
    Modalities(  # ERNIE-VL
        each=(
            Modality("text", "text_moe", "gate.weight", 1),
            Modality("vision", "vision_moe", "gate.weight_1", 1),
        ),
        bias="moe_statics.e_score_correction_bias",
    ),
)


@dataclass(frozen=True)
class Removal:
    """Of the `total` experts of `block`, those with the ids `kept` stay, in this order.

    `layers` are the plan's names of the block, several where they share it. `places` are where the
    config counts its experts. `model_type` chooses rows of the tables.
    """

    block: Block
    layers: tuple[str, ...]
    total: int
    kept: tuple[int, ...]
    places: tuple[counts.Place, ...]
    modalities: Modalities | None
    model_type: str

    @property
    def kept_by_modality(self) -> tuple[tuple[int, ...], ...]:
        """`kept` with the ids that the routers use: each modality has its own, from 0."""
        size = self.total // (len(self.modalities.each) if self.modalities else 1)
        return tuple(
            tuple(i - first for i in self.kept if first <= i < first + size)
            for first in range(0, self.total, size)
        )


def removals_of(
    plan: Plan, config: Mapping[str, Any], shapes: Shapes, blocks: Mapping[str, Block]
) -> tuple[Removal, ...]:
    """One for each block that the plan speaks of, in the plan's order.

    ReapError when a layer has no block or no count in the config, or when layers that share a block
    are not pruned alike.
    """
    served: dict[str, list[LayerInfo]] = {}
    for layer in plan.model.layers:
        served.setdefault(resolve(layer.name, blocks).module, []).append(layer)
    return tuple(
        _removal(blocks[module], layers, plan, config, shapes) for module, layers in served.items()
    )


def _removal(
    block: Block, layers: list[LayerInfo], plan: Plan, config: Mapping[str, Any], shapes: Shapes
) -> Removal:
    names = tuple(layer.name for layer in layers)
    places = dict.fromkeys(place for layer in layers for place in _places(config, block, layer))
    modalities = _modalities(block, names, shapes)
    total, kept = layers[0].num_experts, plan.kept[names[0]]
    if modalities:
        kept = _in_one_sequence(modalities, block, total, {name: plan.kept[name] for name in names})
        total *= len(modalities.each)
    elif any(plan.kept[name] != kept for name in names):
        raise ReapError(
            f"{names[0]} and {names[1]} share their weights: the plan must keep the same experts"
        )
    return Removal(block, names, total, kept, tuple(places), modalities, plan.model.model_type)


def _places(config: Mapping[str, Any], block: Block, layer: LayerInfo) -> list[counts.Place]:
    name = f"{layer.name}.{block.module}"
    # Of layers with different numbers, a config that has one number has the largest.
    total = max(counts_in(config).values(), default=layer.num_experts)
    places = counts.places_of(config, name, block.number, total)
    if not places:
        raise ReapError(
            f"{CONFIG} does not say that {layer.name} has {layer.num_experts} experts "
            f"({', '.join(EXPERT_COUNT_KEYS)})"
        )
    return places


def _modalities(block: Block, layers: Iterable[str], shapes: Shapes) -> Modalities | None:
    for row in MODALITIES:
        if f"{block.module}.{row.each[-1].router}" in shapes or any(map(row.index, layers)):
            return row
    return None


def _in_one_sequence(
    row: Modalities, block: Block, size: int, kept: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...]:
    """The ids in the file of what is `kept` of each layer, one modality of `size` experts."""
    found = {row.index(layer): ids for layer, ids in kept.items()}
    if not len(kept) == len(found) == len(row.each) or len(set(map(len, kept.values()))) > 1:
        raise ReapError(
            f"{block.module} holds {row} experts under one count: "
            "the plan must speak of both and keep equally many"
        )
    return tuple(size * i + expert for i in sorted(found) for expert in found[i])


def kept_by_place(removals: Iterable[Removal]) -> dict[counts.Place, dict[int, int]]:
    """Place in the config -> layer number -> experts kept, as the config counts them.

    ReapError when one number would have to be two.
    """
    found: dict[counts.Place, dict[int, int]] = {}
    for removal in removals:
        for place in removal.places:
            kept = len(removal.kept_by_modality[0])
            # Layers that are numbered apart from the model's are in none of its lists.
            number = -1 if removal.block.named_mtp else removal.block.number
            if found.setdefault(place, {}).setdefault(number, kept) != kept:
                raise ReapError(
                    f"{removal.block.module} would keep {kept} experts and another block of layer "
                    f"{removal.block.number} {found[place][number]}, but {place} counts both: "
                    "make a uniform plan"
                )
    return found


@dataclass(frozen=True)
class MtpLayers:
    """Prefixes of multi-token-prediction layers with experts, sorted: the plan speaks of those that
    are `kept`; the others are `dropped`, since no statistics say which of their experts matter."""

    kept: tuple[str, ...]
    dropped: tuple[str, ...]


def mtp_layers(
    config: Mapping[str, Any],
    shapes: Shapes,
    blocks: Mapping[str, Block],
    removals: Sequence[Removal],
) -> MtpLayers:
    """ReapError for another block that the plan does not speak of, if a number that is edited
    counts its experts too."""
    kept = {
        prefix
        for removal in removals
        if (prefix := extra_prefix(removal.block, {removal.block.stack}, _depth(config, [removal])))
    }
    spoken_of = {removal.block.module for removal in removals}
    stacks = {removal.block.stack for removal in removals}
    places = dict.fromkeys(place for removal in removals for place in removal.places)
    depth, dropped = _depth(config, removals), set[str]()
    for module, block in blocks.items():
        if module in spoken_of:
            continue
        prefix = extra_prefix(block, stacks, depth)
        if prefix is not None:
            dropped.add(prefix)
            continue
        total = experts_in(block, shapes)
        counted = counts.places_of(config, module, block.number, total)
        if not counted or not places.keys().isdisjoint(counted):
            raise ReapError(
                f"{module} has experts that the plan does not speak of, counted by the same number"
            )
    if kept & dropped:
        raise ReapError(f"{min(kept & dropped)} has experts that the plan does not speak of")
    return MtpLayers(tuple(sorted(kept)), tuple(sorted(dropped)))


def _depth(config: Mapping[str, Any], removals: Iterable[Removal]) -> int | None:
    """How many layers the stack has whose experts are removed."""
    depths = (counts.depth_of(config, p.path) for removal in removals for p in removal.places)
    return next((depth for depth in depths if depth is not None), None)
