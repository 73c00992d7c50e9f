"""The file of statistics: safetensors, so that any tool can read it without running code.

Metadata "reap" is one JSON object: format, version, model, gates, pairs, data, versions, and
`parts`, the names of the layers observed per domain. Domain number d (sorted) and layer own the
tensors "d/layer/field" that `LayerStatistics.tensors` describes: sums are stored exactly, in units
of 2**-320.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from reap.errors import ReapError
from reap.files.atomic import write_file
from reap.files.kinds import kind_of
from reap.files.outputs import STATISTICS, check_file
from reap.files.safefile import parse_json, read_header
from reap.model.info import LayerInfo, ModelInfo
from reap.statistics.exact import LIMBS
from reap.statistics.layerstats import SUMS

FORMAT = STATISTICS
VERSION = 2
READS = (1, 2)  # 1 has no structure of the model

_KINDS = {
    "model": dict,
    "gates": str,
    "pairs": bool,
    "data": list,
    "versions": dict,
    "parts": dict,
}


@dataclass(frozen=True)
class State:
    """What a file holds. `parts`: (domain, layer) -> the tensors of `LayerStatistics.tensors`."""

    model: ModelInfo
    gates: str
    pairs: bool
    data: list[dict[str, Any]]
    versions: dict[str, str]
    parts: Mapping[tuple[str, str], Mapping[str, Tensor]]


def write(state: State, path: str | PathLike[str], *, overwrite: bool = False) -> None:
    """Whole or not at all. ReapError if `path` exists or cannot be written.

    `overwrite` replaces statistics alone.
    """
    check_file(path, FORMAT, overwrite=overwrite)
    tensors, parts = _flatten(state)
    about = {
        "format": FORMAT,
        "version": VERSION,
        "model": state.model.to_json(),
        "gates": state.gates,
        "pairs": state.pairs,
        "data": state.data,
        "versions": state.versions,
        "parts": parts,
    }
    text = json.dumps(about, sort_keys=True)
    write_file(path, safetensors.torch.save(tensors, {"reap": text}), overwrite=overwrite)


def read(path: str | PathLike[str]) -> State:
    """What `write` wrote. ReapError for anything else, or for damage that can be seen."""
    path = Path(path)
    kind = kind_of(path)
    if kind not in (None, "statistics", "weights of a model"):
        raise ReapError(
            f"{path} is {kind}, it holds no statistics: give a file that `reap calibrate` wrote"
        )
    header = read_header(path)
    about = _about(path, header.metadata)
    model = ModelInfo.from_json(about["model"], transformers=about["versions"].get("transformers"))
    pairs = about["pairs"]
    places = [
        (domain, f"{number}/{name}", model.layer(name))
        for number, (domain, names) in enumerate(sorted(about["parts"].items()))
        for name in names
    ]
    # Shapes come first: nothing is read or allocated on the word of a file that contradicts itself.
    expected = {
        f"{prefix}/{field}": shape
        for _, prefix, layer in places
        for field, shape in _shapes(layer, pairs).items()
    }
    found = {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ReapError(
                f"{path}: tensor {name!r} is {_show(found.get(name))}, "
                f"its metadata asks for {_show(expected.get(name))}"
            )
    try:
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise ReapError(f"cannot read {path}: {error}") from error
    parts = {}
    for domain, prefix, layer in places:
        part = {field: tensors[f"{prefix}/{field}"] for field in _shapes(layer, pairs)}
        fault = _contradiction(part, layer)
        if fault:
            raise ReapError(f"{path} is damaged: domain {domain}, layer {layer.name}: {fault}")
        parts[domain, layer.name] = part
    return State(model, about["gates"], pairs, about["data"], about["versions"], parts)


def digest(state: State) -> str:
    """Hex SHA-256 of model, gates and every exact sum."""
    tensors, parts = _flatten(state)
    model = state.model.to_json()
    model.pop("transformers", None)  # says of no number how it came about
    about = [model, state.gates, state.pairs, parts]
    hashed = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    hashed.update(safetensors.torch.save(tensors))
    return hashed.hexdigest()


def _flatten(state: State) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """The tensors by their names in the file, and the layers of every domain."""
    number = {domain: i for i, domain in enumerate(sorted({domain for domain, _ in state.parts}))}
    tensors: dict[str, Tensor] = {}
    parts: dict[str, list[str]] = {domain: [] for domain in number}
    for (domain, layer), part in sorted(state.parts.items(), key=lambda item: item[0]):
        parts[domain].append(layer)
        for field, tensor in part.items():
            tensors[f"{number[domain]}/{layer}/{field}"] = tensor
    return tensors, parts


def _about(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """The JSON object in the metadata, its outer shape checked."""
    if "reap" not in metadata:
        raise ReapError(f"{path} holds no statistics: it was not written by `reap calibrate`")
    about = parse_json(metadata["reap"].encode(errors="surrogatepass"), f"the metadata of {path}")
    if about.get("format") != FORMAT:
        raise ReapError(f"{path} holds no statistics: its format is {about.get('format')!r}")
    if about.get("version") not in READS:
        raise ReapError(
            f"{path} has format version {about.get('version')!r}: "
            f"this program reads up to version {VERSION}"
        )
    for field, kind in _KINDS.items():
        if not isinstance(about.get(field), kind):
            raise ReapError(f"{path}: metadata field {field!r} must be a JSON {kind.__name__}")
    if not all(isinstance(spec, dict) for spec in about["data"]):
        raise ReapError(f"{path}: metadata field 'data' must be a list of objects")
    if not all(isinstance(text, str) for text in about["versions"].values()):
        raise ReapError(f"{path}: metadata field 'versions' must map names to strings")
    for domain, names in about["parts"].items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ReapError(f"{path}: metadata field 'parts' must map {domain!r} to layer names")
        if not names or len(set(names)) != len(names):
            raise ReapError(f"{path}: domain {domain!r} has no layers, or one of them twice")
    return about


def _shapes(layer: LayerInfo, pairs: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    E = layer.num_experts
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "tokens": ("I64", (1,)),
        "count": ("I64", (E,)),
        "peak": ("F32", (E,)),
    }
    shapes.update({field: ("I32", (E, LIMBS)) for field in SUMS})
    if pairs:
        shapes["pair_count"] = ("I64", (E * (E - 1) // 2,))
        shapes["pair_sums"] = ("I32", (E * (E - 1) // 2, LIMBS))
    return shapes


def _show(entry: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if entry is None else f"{entry[0]} {list(entry[1])}"


def _contradiction(state: dict[str, Tensor], layer: LayerInfo) -> str | None:
    """What in the numbers cannot come from any tokens, or None."""
    tokens, count, peak = int(state["tokens"]), state["count"], state["peak"]
    slots = tokens * layer.top_k
    if tokens < 0 or (count < 0).any():
        return "a count is negative"
    if sum(count.tolist()) > slots:
        return f"{sum(count.tolist())} slots from {tokens} tokens with top_k {layer.top_k}"
    if not (peak.isfinite() & (peak >= 0)).all():
        return "a peak is negative, infinite or NaN"
    unrouted = count == 0
    for field in SUMS:
        if state[field][unrouted].any():
            return f"{field} is not zero for an expert without tokens"
        # Gates may have either sign; norms and squares may not. The top limb carries the sign.
        if (
            field in ("norm_sum", "norm_sq_sum", "weighted_sq_sum")
            and (state[field][:, -1] < 0).any()
        ):
            return f"{field} is negative"
    if peak[unrouted].any():
        return "peak is not zero for an expert without tokens"
    if "pair_count" in state:
        pairs = state["pair_count"]
        if (pairs < 0).any() or sum(pairs.tolist()) > slots * (layer.top_k - 1) // 2:
            return "impossible counts of pairs"
        if state["pair_sums"][pairs == 0].any():
            return "a pair without tokens has a sum that is not zero"
    return None
