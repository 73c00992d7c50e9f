"""Where a config.json says how many experts there are, and the same config with fewer.

The number goes by several names, may lie in a sub-config (`text_config`), in several at once, as a
list with one entry per layer, or in a table per layer. Every place that speaks of the pruned
experts is edited, nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from reap.model.config import EXPERT_COUNT_KEYS

DEPTHS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
# How many multi-token-prediction layers follow; zero once they are dropped.
EXTRA_LAYERS = (
    "num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules", "mtp_num_layers",
    "mtp_num_hidden_layers", "n_mtp_layers",
)  # fmt: skip
PER_LAYER = "per_layer_config"  # layer number -> a config of that layer alone
# Words of a config's path that do not tell one stack of layers from another.
_COMMON = {"config", "text", "llm", "language", "model", "per", "layer"}


@dataclass(frozen=True)
class Place:
    """`config[path...][key]` counts experts, only those of layer `layer` unless that is None."""

    path: tuple[str, ...]
    key: str
    layer: int | None

    @property
    def words(self) -> set[str]:
        """What tells this place from others, e.g. {"talker"} for talker_config.text_config."""
        parts = {word for step in self.path for word in step.split("_")}
        return {word for word in parts - _COMMON if not word.isdigit()}

    def __str__(self) -> str:
        return ".".join((*self.path, self.key))


def at(config: Mapping[str, Any], path: Iterable[str]) -> Any:
    value: Any = config
    for step in path:
        value = value[step]
    return value


def places(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[Place]:
    """Every place in a config that counts experts."""
    for key, value in config.items():
        if isinstance(value, dict) and key != "quantization_config":
            yield from places(value, (*path, key))
        elif key in EXPERT_COUNT_KEYS and (
            _is_count(value) or (isinstance(value, list) and value and all(map(_is_count, value)))
        ):
            per_layer = len(path) > 1 and path[-2] == PER_LAYER and path[-1].isdigit()
            yield Place(path, key, int(path[-1]) if per_layer else None)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def places_of(config: Mapping[str, Any], name: str, number: int, total: int) -> list[Place]:
    """The places that count the `total` experts of layer `number` in the stack called `name`."""

    def says_total(place: Place) -> bool:
        value = at(config, (*place.path, place.key))
        if isinstance(value, list):
            depth = depth_of(config, place.path)
            value = value[number] if len(value) == depth and number < len(value) else value[0]
        return value == total and place.layer in (None, number)

    found = [place for place in places(config) if says_total(place)]
    # `talker_config` counts no thinker's experts; `vision_config` rather than the root counts a
    # vision tower's.
    own = [place for place in found if all(word in name for word in place.words)]
    most = max((len(place.words) for place in own), default=0)
    found = [place for place in own if len(place.words) == most]
    return [place for place in found if place.layer is not None] or found


def depth_of(config: Mapping[str, Any], path: tuple[str, ...]) -> int | None:
    """The number of layers that the config at `path`, or the nearest one around it, speaks of."""
    for end in range(len(path), -1, -1):
        around = at(config, path[:end])
        for key in DEPTHS:
            if _is_count(around.get(key)):
                return around[key]
    return None


def is_uneven(config: Mapping[str, Any], place: Place, kept: Mapping[int, int]) -> bool:
    """Whether the place has one number and would have to have several."""
    old = at(config, (*place.path, place.key))
    per_layer = isinstance(old, list) and len(old) == depth_of(config, place.path)
    return not per_layer and len(set(kept.values())) > 1


def with_fewer(
    config: Mapping[str, Any], counts: Mapping[Place, Mapping[int, int]], drop_extra: bool
) -> tuple[dict[str, Any], list[str]]:
    """The pruned config, and what changed in it as lines of text. `counts`: place -> layer number
    -> experts kept. Where one number would have to be several, it is the largest."""
    new = copy.deepcopy(dict(config))
    changes = []
    for place, kept in counts.items():
        owner = at(new, place.path)
        old = owner[place.key]
        values = set(kept.values())
        if isinstance(old, list) and len(old) == depth_of(config, place.path):
            owner[place.key] = [kept.get(i, n) for i, n in enumerate(old)]
        else:
            value = max(values)
            owner[place.key] = [value] * len(old) if isinstance(old, list) else value
        changes.append(f"{place}: {old} -> {owner[place.key]}")
    if drop_extra:
        for path in sorted(
            {(), *(place.path[:i] for place in counts for i in range(len(place.path) + 1))}
        ):
            owner = at(new, path)
            for key in EXTRA_LAYERS:
                if _is_count(owner.get(key)):
                    changes.append(f"{'.'.join((*path, key))}: {owner[key]} -> 0")
                    owner[key] = 0
    return new, changes
