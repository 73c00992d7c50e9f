"""What identifies a model: the facts that statistics, plans and checkpoints must agree on."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from reap.errors import ReapError
from reap.model.structure import Structure

REQUIRED = ("model_type", "name", "fingerprint", "weights", "layers")  # of a model
MOST_EXPERTS = 1 << 16  # per layer: a file must not ask for memory without end


@dataclass(frozen=True)
class LayerInfo:
    """One MoE layer.

    `name` is the qualified name of its experts module, e.g. "model.layers.3.mlp.experts".
    A group-limited router splits its experts into `n_group` equal runs, keeps the best `topk_group`
    of them per token and needs at least `min_per_group` experts in each to score a group.
    """

    name: str
    num_experts: int
    top_k: int
    n_group: int = 1
    topk_group: int = 1
    min_per_group: int = 1

    def __post_init__(self) -> None:
        _typed("layer name", self.name, str)
        for field in ("num_experts", "top_k", "n_group", "topk_group", "min_per_group"):
            value = getattr(self, field)
            _typed(f"{field} of layer {self.name}", value, int)
            if value < 1:
                raise ReapError(f"{field} of layer {self.name} is {value}: it must be 1 or more")
        if self.num_experts > MOST_EXPERTS:
            raise ReapError(
                f"num_experts of layer {self.name} is {self.num_experts}: more than {MOST_EXPERTS}"
            )
        if self.top_k > self.num_experts:
            raise ReapError(
                f"layer {self.name}: top_k {self.top_k} exceeds its {self.num_experts} experts"
            )
        if self.num_experts % self.n_group:
            raise ReapError(
                f"layer {self.name}: {self.num_experts} experts do not split into "
                f"{self.n_group} equal groups"
            )
        if self.topk_group > self.n_group:
            raise ReapError(
                f"layer {self.name}: topk_group {self.topk_group} exceeds its {self.n_group} groups"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> LayerInfo:
        """Raises ReapError when a field is missing, unknown or of the wrong type."""
        return cls(**_fields(data, cls, "layer"))


@dataclass(frozen=True)
class ModelInfo:
    """One model: `structure` says what it is, `weights` covers its parameters (None: unknown).

    `fingerprint` covers the configuration with the defaults of the release of `transformers` that
    computed it: it means something only against another of the same release. Files of version 1
    have no `structure`.
    """

    model_type: str
    name: str
    fingerprint: str
    weights: str | None
    layers: tuple[LayerInfo, ...]
    structure: Structure | None = dataclasses.field(default=None, hash=False, repr=False)
    transformers: str | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        for field in ("model_type", "name", "fingerprint"):
            _typed(f"model {field}", getattr(self, field), str)
        for field in ("weights", "transformers"):
            if getattr(self, field) is not None:
                _typed(f"model {field}", getattr(self, field), str)
        names = [layer.name for layer in self.layers]
        if len(set(names)) != len(names):
            raise ReapError(f"model {self.name} names a MoE layer twice")

    def layer(self, name: str) -> LayerInfo:
        """The layer called `name`; ReapError when the model has none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise ReapError(f"model {self.name} has no MoE layer called {name!r}")

    def difference(self, other: ModelInfo, *, to_prune: bool = False) -> str | None:
        """One phrase that says how `other` is a different model, or None when it is the same one.

        The name is only a label. What one side does not know, such as the weights of a model that
        is not from a folder, matches anything, and layers may be under another module, as some
        releases of transformers move them. `to_prune` allows other data types, which pruning does
        not mind, and of which `notes` speaks.
        """
        if self.model_type != other.model_type:
            return f"model type {self.model_type} against {other.model_type}"
        if _in_stack(self.layers) != _in_stack(other.layers):
            return _layer_difference(self.layers, other.layers)
        if self.structure and other.structure:
            different = self.structure.difference(other.structure)
            if different:
                return different
        if self._configs_compared(other) is False:
            return "a field of the configuration, which a file of an earlier version does not name"
        if None in (self.weights, other.weights) or self.weights == other.weights:
            return None
        precision = self._precision(other)
        if precision:
            return None if to_prune else f"the same structure in other data types: {precision}"
        if not (self.structure and other.structure):
            return (
                "other weights; a file of an earlier version does not say whether they are "
                "this model in another precision: calibrate again"
            )
        return "other weights of the same structure and data types: another checkpoint"

    def notes(self, other: ModelInfo) -> list[str]:
        """What is worth a look between two descriptions of one model, a line each."""
        notes = []
        precision = self._precision(other)
        if precision:
            notes.append(f"another precision of the same structure: {precision}")
        if self.structure and other.structure:
            notes += self.structure.notes(other.structure)
        elif self._configs_compared(other) is None:
            notes.append(
                "a file of an earlier version, written with another transformers: layers and "
                + ("weights" if None not in (self.weights, other.weights) else "model type")
                + " agree, other fields of the configuration were not compared"
            )
        return notes

    def _precision(self, other: ModelInfo) -> str | None:
        if not (self.structure and other.structure):
            return None
        return self.structure.precision(other.structure)

    def _configs_compared(self, other: ModelInfo) -> bool | None:
        """Whether the configurations agree where only fingerprints can tell; None: they cannot."""
        if self.fingerprint == other.fingerprint:
            return True
        mine, theirs = self.structure, other.structure
        if mine and theirs and mine.config and theirs.config:
            return True  # compared field by field
        return False if self.transformers == other.transformers is not None else None

    def to_json(self) -> dict[str, Any]:
        """Without what is unknown, as files of version 1 are."""
        known = {
            "structure": self.structure and self.structure.to_json(),
            "transformers": self.transformers,
        }
        return {
            **{name: getattr(self, name) for name in ("model_type", "name", "fingerprint")},
            "weights": self.weights,
            "layers": [layer.to_json() for layer in self.layers],
            **{name: value for name, value in known.items() if value is not None},
        }

    @classmethod
    def from_json(cls, data: Any, *, transformers: Any = None) -> ModelInfo:
        """`transformers`: the release that computed the fingerprint, where the data does not say.

        Raises ReapError when a field is missing, unknown or of the wrong type.
        """
        fields = _fields(data, cls, "model")
        if not isinstance(fields.get("layers"), list):
            raise ReapError("model description: layers must be a list")
        layers = tuple(LayerInfo.from_json(layer) for layer in fields["layers"])
        if fields.get("structure") is not None:
            fields["structure"] = Structure.from_json(fields["structure"])
        if "transformers" not in fields and isinstance(transformers, str):
            fields["transformers"] = transformers
        return cls(**{**fields, "layers": layers})


def _in_stack(layers: tuple[LayerInfo, ...]) -> tuple[LayerInfo, ...]:
    """The layers with names from their stack on, e.g. "layers.3.mlp.experts"."""
    found = ((layer, re.search(r"[^.]+\.\d+\..*", layer.name)) for layer in layers)
    return tuple(dataclasses.replace(layer, name=m[0]) if m else layer for layer, m in found)


def _layer_difference(mine: tuple[LayerInfo, ...], theirs: tuple[LayerInfo, ...]) -> str:
    if len(mine) != len(theirs):
        fewer, more = sorted((mine, theirs), key=len)
        odd = {layer.name for layer in mine} ^ {layer.name for layer in theirs}
        one = f", {min(odd)} in one alone" if odd else ""
        if _in_stack(fewer) == _in_stack(more[:-1]):
            one = (
                f", {more[-1].name} in one alone, as where one has the layer of multi-token "
                "prediction and one is without it (--no-mtp)"
            )
        return f"{len(mine)} MoE layers against {len(theirs)}{one}"
    mine, theirs = _in_stack(mine), _in_stack(theirs)
    ours, other = next((a, b) for a, b in zip(mine, theirs, strict=True) if a != b)
    if ours.name != other.name:
        return f"layer {ours.name} against {other.name}"
    changed = [k for k, v in asdict(ours).items() if v != getattr(other, k)]
    values = ", ".join(f"{k} {getattr(ours, k)} against {getattr(other, k)}" for k in changed)
    return f"layer {ours.name}: {values}"


def _typed(what: str, value: object, kind: type) -> None:
    # bool is an int to Python, never to a reader of the file.
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ReapError(f"{what} is {value!r}: it must be of type {kind.__name__}")


def _fields(data: Any, cls: type, what: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ReapError(f"{what} description is a {type(data).__name__}: it must be an object")
    known = cls.__dataclass_fields__  # type: ignore[attr-defined]
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise ReapError(f"{what} description has an unknown field {unknown[0]!r}")
    required = ("name", "num_experts", "top_k") if cls is LayerInfo else REQUIRED
    for field in required:
        if field not in data:
            raise ReapError(f"{what} description lacks {field!r}")
    return dict(data)
