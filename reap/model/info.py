"""What identifies a model: the facts that statistics, plans and checkpoints must agree on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from reap.errors import ReapError

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
    """One model: `fingerprint` covers its structure, `weights` its parameters (None: unknown)."""

    model_type: str
    name: str
    fingerprint: str
    weights: str | None
    layers: tuple[LayerInfo, ...]

    def __post_init__(self) -> None:
        for field in ("model_type", "name", "fingerprint"):
            _typed(f"model {field}", getattr(self, field), str)
        if self.weights is not None:
            _typed("model weights", self.weights, str)
        names = [layer.name for layer in self.layers]
        if len(set(names)) != len(names):
            raise ReapError(f"model {self.name} names a MoE layer twice")

    def layer(self, name: str) -> LayerInfo:
        """The layer called `name`; ReapError when the model has none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise ReapError(f"model {self.name} has no MoE layer called {name!r}")

    def difference(self, other: ModelInfo) -> str | None:
        """One phrase that says how `other` is a different model, or None when it is the same one.

        The name is only a label. Unknown weights (a model that is not from a folder) match any.
        """
        if self.model_type != other.model_type:
            return f"model type {self.model_type} against {other.model_type}"
        if self.layers != other.layers:
            return _layer_difference(self.layers, other.layers)
        if self.fingerprint != other.fingerprint:
            return f"config fingerprint {self.fingerprint[:12]} against {other.fingerprint[:12]}"
        if None not in (self.weights, other.weights) and self.weights != other.weights:
            return f"weights {str(self.weights)[:12]} against {str(other.weights)[:12]}"
        return None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "layers": [layer.to_json() for layer in self.layers]}

    @classmethod
    def from_json(cls, data: Any) -> ModelInfo:
        """Raises ReapError when a field is missing, unknown or of the wrong type."""
        fields = _fields(data, cls, "model")
        if not isinstance(fields.get("layers"), list):
            raise ReapError("model description: layers must be a list")
        layers = tuple(LayerInfo.from_json(layer) for layer in fields["layers"])
        return cls(**{**fields, "layers": layers})


def _layer_difference(mine: tuple[LayerInfo, ...], theirs: tuple[LayerInfo, ...]) -> str:
    if len(mine) != len(theirs):
        return f"{len(mine)} MoE layers against {len(theirs)}"
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
    required = ("name", "num_experts", "top_k") if cls is LayerInfo else tuple(known)
    for field in required:
        if field not in data:
            raise ReapError(f"{what} description lacks {field!r}")
    return dict(data)
