"""Which experts become one, and by which weights: safe by construction and frozen as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from types import MappingProxyType
from typing import Any

from reap.errors import ReapError
from reap.files.atomic import write_file
from reap.files.kinds import kind_of
from reap.files.outputs import MERGE, check_file
from reap.files.paths import path_of
from reap.files.safefile import parse_json, read_json
from reap.files.units import counted
from reap.model.info import LayerInfo, ModelInfo

VERSION = 1
MOST = 2**63  # of a weight, which is a number of tokens


@dataclass(frozen=True)
class Group:
    """Experts, ascending, that all become sum of weights[i] * experts[i] / sum of weights."""

    experts: tuple[int, ...]
    weights: tuple[float, ...]  # from 0 to 2**63, not all zero

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights, adding up to 1."""
        total = math.fsum(self.weights)
        return tuple(weight / total for weight in self.weights)


@dataclass(frozen=True)
class Merge:
    """Groups of experts that become one, in every MoE layer of `model`.

    `groups` maps every layer's name to groups that cover its experts once, in the order of their
    first ids. The router is left alone: it keeps an output per expert, so that the gates of a
    group's experts add up. `options` and `calibration` are free-form JSON, as of a plan. ReapError
    on creation when the layers are not the model's, or the groups do not cover the experts.
    """

    model: ModelInfo
    method: str
    groups: Mapping[str, tuple[Group, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.model.layers]
        if set(self.groups) != set(names):
            odd = sorted(set(self.groups) ^ set(names))[0]
            where = "the model but not the merge" if odd in names else "the merge but not the model"
            raise ReapError(f"a merge must cover the model's MoE layers: {odd!r} is in {where}")
        for layer in self.model.layers:
            _check_groups(layer, self.groups[layer.name])
        groups = {name: tuple(self.groups[name]) for name in names}
        object.__setattr__(self, "groups", MappingProxyType(groups))

    def __repr__(self) -> str:
        counts = {(layer.num_experts, len(self.groups[layer.name])) for layer in self.model.layers}
        told = ", ".join(f"{experts} to {left}" for experts, left in sorted(counts))
        return (
            f"<Merge of {self.model.name} by {self.method}: {told} experts in "
            f"{counted(len(self.groups), 'layer')}>"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles, which cannot have a read-only view of a mapping."""
        return _made, ({**vars(self), "groups": dict(self.groups)},)

    @property
    def left(self) -> dict[str, int]:
        """How many different experts each layer has afterwards."""
        return {name: len(groups) for name, groups in self.groups.items()}

    def to_json(self) -> str:
        """The merge as JSON text."""
        layers = {
            name: [{"experts": list(g.experts), "weights": list(g.weights)} for g in groups]
            for name, groups in self.groups.items()
        }
        about = {
            "format": MERGE,
            "version": VERSION,
            "model": self.model.to_json(),
            "method": self.method,
            "layers": layers,
            "options": dict(self.options),
            "calibration": dict(self.calibration),
        }
        return json.dumps(about, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Merge:
        """The inverse of `to_json`. ReapError for anything else."""
        data = parse_json(text.encode(errors="surrogatepass"), "the merge")
        return cls._from_object(data, "the merge")

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Write `to_json`, whole or not at all. ReapError if `path` exists or cannot be written.

        `overwrite` replaces a merge alone.
        """
        path_of(path, "path", "the file to write")
        check_file(path, MERGE, overwrite=overwrite)
        write_file(path, self.to_json().encode(), overwrite=overwrite)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Merge:
        """Read what `save` wrote. ReapError for anything else."""
        path = path_of(path, "the merge", "a merge, or the file of one")
        kind = kind_of(path)
        if kind not in (None, "a merge"):
            raise ReapError(f"{path} is {kind}, not a merge: give the file that `reap group` wrote")
        return cls._from_object(read_json(path), str(path))

    @classmethod
    def of(cls, given: Merge | str | PathLike[str]) -> Merge:
        """A merge as it is, or the one in a file. ReapError for anything else."""
        return given if isinstance(given, cls) else cls.load(given)  # type: ignore[arg-type]

    @classmethod
    def _from_object(cls, data: dict[str, Any], where: str) -> Merge:
        if data.get("format") != MERGE:
            raise ReapError(f"{where} is no merge: its format is {data.get('format')!r}")
        if data.get("version") != VERSION:
            raise ReapError(
                f"{where} has version {data.get('version')!r}: this program reads version {VERSION}"
            )
        for name, kind in {
            "method": str, "layers": dict, "options": dict, "calibration": dict
        }.items():  # fmt: skip
            if type(data.get(name)) is not kind:
                raise ReapError(f"{where}: field {name!r} must be a JSON {kind.__name__}")
        try:
            return cls(
                model=ModelInfo.from_json(data.get("model")),
                method=data["method"],
                groups={name: _read(name, entry) for name, entry in data["layers"].items()},
                options=data["options"],
                calibration=data["calibration"],
            )
        except ReapError as error:
            raise ReapError(f"{where}: {error}") from error


def _made(fields: dict[str, Any]) -> Merge:
    return Merge(**fields)


def _read(name: str, entry: Any) -> tuple[Group, ...]:
    if isinstance(entry, list):
        groups = [group for group in entry if isinstance(group, dict)]
        if len(groups) == len(entry) and all(
            set(group) == {"experts", "weights"} and all(type(v) is list for v in group.values())
            for group in groups
        ):
            return tuple(Group(tuple(g["experts"]), tuple(g["weights"])) for g in groups)
    raise ReapError(f"layer {name!r} must be a list of objects of the lists experts and weights")


def _check_groups(layer: LayerInfo, groups: Iterable[Group]) -> None:
    found: list[int] = []
    first = -1
    for group in groups:
        ids = list(group.experts)
        for expert in ids:
            if type(expert) is not int or not 0 <= expert < layer.num_experts:
                raise ReapError(
                    f"layer {layer.name}: expert {expert!r} of a group must be an id from 0 to "
                    f"{layer.num_experts - 1}"
                )
        if not ids or ids != sorted(set(ids)) or ids[0] <= first:
            raise ReapError(
                f"layer {layer.name}: groups must ascend by their first expert, and the experts of "
                "each without repeats"
            )
        first = ids[0]
        found += ids
        if len(group.weights) != len(ids) or not _are_weights(group.weights):
            raise ReapError(
                f"layer {layer.name}: the weights of experts {ids[:4]} must be {len(ids)} "
                "numbers from 0 to 2**63, one of them more than 0"
            )
    if sorted(found) != list(range(layer.num_experts)):
        raise ReapError(
            f"layer {layer.name}: groups must hold each of its {layer.num_experts} experts once"
        )


def _are_weights(weights: Iterable[Any]) -> bool:
    values = list(weights)
    return any(values) and all(type(w) in (int, float) and 0 <= w <= MOST for w in values)
