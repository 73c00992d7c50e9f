"""What can be told of a model's structure, in its own words: named facts, compared one by one.

The facts are read off a folder's files as they are written, or counted on modules. None of them
holds a default of the installed transformers, so they outlive its releases. A fact that one side
does not know is no difference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from reap.errors import ReapError

# Fields of a configuration that say how a model is run or labelled, not what it is.
NOT_STRUCTURE = re.compile(
    r"_.*|.*dtype|transformers_version|architectures|use_cache|output_.*|return_dict.*|.*_token_id"
    r"|id2label|label2id|problem_type|quantization_config|initializer_range|.*dropout|auto_map"
    r"|chunk_size_feed_forward|name_or_path|tie_word_embeddings|is_encoder_decoder|model_type"
    r"|num_logits_to_keep|use_.*kernels?|.*_loss_coef|.*_aux_.*"
)
# How quantised checkpoints describe themselves, beside `quantization_config`.
QUANTISATION = re.compile(r"quantization|compression_config")
# Fields that people edit to run the same weights otherwise: worth a note, no other model.
ADJUSTABLE = re.compile(
    r"max_position_embeddings|original_max_position_embeddings|rope_.*|(use_)?sliding_window"
    r"|max_window_layers|pretraining_tp|ep_size|aux_loss.*"
    r"|num_nextn_predict_layers|num_mtp_.*|mtp_.*|n_mtp_layers"
)
PLAIN = re.compile(r"(F64|F32|F16|BF16|F8_\w+) ")  # stored value by value: shapes are the model's
AUXILIARY = re.compile(r"scale|zero|amax|g_idx|absmax|weight_shape")  # beside quantised weights
OF_QUANTISATION = re.compile(rf"{AUXILIARY.pattern}|qweight|packed|quant")
EXPERTS = re.compile(r"(^|[._])experts[._]")


@dataclass(frozen=True)
class Structure:
    """Facts of four kinds, each empty where nothing is known.

    `config`: dotted field -> value, as config.json has it. `tensors`: names in the files with * for
    numbers -> what is stored there, such as "BF16 [64, 2048]". `routers`: tensor -> its dtype, a
    hash of its first bytes and one of the norms of its layer. `modules`: sizes counted on modules.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    routers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    modules: Mapping[str, int] = field(default_factory=dict)

    def difference(self, other: Structure) -> str | None:
        """The first fact that both know and that differs, as a phrase."""
        for kind in ("config", "modules"):
            mine, theirs = getattr(self, kind), getattr(other, kind)
            for name in sorted(mine.keys() & theirs.keys()):
                if mine[name] != theirs[name] and not _adjustable(name):
                    return f"{name} {_show(mine[name])} against {_show(theirs[name])}"
        for name in sorted(self.tensors.keys() & other.tensors.keys()):
            shapes, others = _shapes(name, self.tensors[name]), _shapes(name, other.tensors[name])
            if shapes and others and shapes != others:
                odd, its = sorted(shapes - others), sorted(others - shapes)
                return (
                    f"tensor {name} {(odd or sorted(shapes))[0]} against {(its or ['others'])[0]}"
                )
        return self._router_difference(other)

    def _router_difference(self, other: Structure) -> str | None:
        # Methods that smooth activations (AWQ) move factors from a norm into the router behind it:
        # routers tell two models apart where the norms are the same.
        for name in sorted(self.routers.keys() & other.routers.keys()):
            dtype, mine, norms = self.routers[name]
            if (dtype, norms) == other.routers[name][::2] and mine != other.routers[name][1]:
                return f"other weights: the router {name} of {dtype} holds other values"
        return None

    def notes(self, other: Structure) -> list[str]:
        """Adjustable fields that differ."""
        return [
            f"{name} is {_show(self.config[name])} there and {_show(other.config[name])} here"
            for name in sorted(self.config.keys() & other.config.keys())
            if _adjustable(name) and self.config[name] != other.config[name]
        ]

    def precision(self, other: Structure) -> str | None:
        """The data types of both as a phrase, where they differ; None where they do not."""
        if not self.tensors or not other.tensors:
            return None
        both = self.tensors.keys() & other.tensors.keys()
        same = all(_dtypes(self.tensors, n) == _dtypes(other.tensors, n) for n in both)
        if same and _dtypes(self.tensors) == _dtypes(other.tensors):
            return None
        return f"{' and '.join(self._stored())} against {' and '.join(other._stored())}"

    def _stored(self) -> list[str]:
        """The data types of the experts' weights, or of everything where none is named so."""
        experts = [n for n in self.tensors if EXPERTS.search(n) and not AUXILIARY.search(n)]
        return sorted(_dtypes(self.tensors, *experts))

    def to_json(self) -> dict[str, Any]:
        listed = {
            kind: {name: list(entries) for name, entries in getattr(self, kind).items()}
            for kind in ("tensors", "routers")
        }
        return {"config": dict(self.config), **listed, "modules": dict(self.modules)}

    @classmethod
    def from_json(cls, data: Any) -> Structure:
        """Raises ReapError for anything that `to_json` does not write."""
        names = [f.name for f in fields(cls)]
        if not isinstance(data, Mapping) or set(data) != set(names):
            raise ReapError(f"model structure must be an object of {', '.join(names)}")
        for name in names:
            if not isinstance(data[name], Mapping):
                raise ReapError(f"model structure: {name} must be an object")
        for kind in ("tensors", "routers"):
            for name, entries in data[kind].items():
                if not isinstance(entries, list) or not all(isinstance(e, str) for e in entries):
                    raise ReapError(f"model structure: {kind} {name!r} must be a list of strings")
                if kind == "routers" and len(entries) != 3:
                    raise ReapError(f"model structure: {kind} {name!r} must have three entries")
        for name, size in data["modules"].items():
            if type(size) is not int:
                raise ReapError(f"model structure: {name} is {size!r}: it must be of type int")
        listed = {
            kind: {name: tuple(entries) for name, entries in data[kind].items()}
            for kind in ("tensors", "routers")
        }
        return cls(config=dict(data["config"]), modules=dict(data["modules"]), **listed)


def as_written(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The structural fields of a config.json by their dotted names. Null is the same as absent."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if NOT_STRUCTURE.fullmatch(key) or QUANTISATION.fullmatch(key) or value is None:
            continue
        if isinstance(value, Mapping):
            found |= as_written(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _adjustable(name: str) -> bool:
    return any(map(ADJUSTABLE.fullmatch, name.split(".")))


def _shapes(name: str, entries: tuple[str, ...]) -> set[str]:
    """The shapes stored under a name, none where they need not be those of the model."""
    if OF_QUANTISATION.search(name) or not all(map(PLAIN.match, entries)):
        return set()
    return {entry.partition(" ")[2] for entry in entries}


def _dtypes(tensors: Mapping[str, tuple[str, ...]], *names: str) -> set[str]:
    return {entry.partition(" ")[0] for name in names or tensors for entry in tensors[name]}


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
