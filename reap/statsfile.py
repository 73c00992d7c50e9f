"""The file of a `Statistics`: safetensors, so that any tool can read it without running code.

Metadata "reap" is one JSON object: format, version, model, gates, pairs, data, versions, and
`parts`, the names of the layers observed per domain. Domain number d (sorted) and layer own the
tensors "d/layer/field" that `LayerStatistics.tensors` describes: sums are stored exactly, in units
of 2**-320.
"""

from __future__ import annotations

import hashlib
import json
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from reap.atomic import write_file
from reap.errors import ReapError
from reap.exact import LIMBS
from reap.info import LayerInfo, ModelInfo
from reap.layerstats import SUMS, LayerStatistics
from reap.safefile import parse_json, read_header
from reap.stats import Statistics

FORMAT = "reap-statistics"
VERSION = 1

_KINDS = {
    "model": dict,
    "gates": str,
    "pairs": bool,
    "data": list,
    "versions": dict,
    "parts": dict,
}


def save(stats: Statistics, path: str | PathLike[str], *, overwrite: bool = False) -> None:
    """See `Statistics.save`."""
    tensors, parts = _flatten(stats)
    about = {
        "format": FORMAT,
        "version": VERSION,
        "model": stats.model.to_json(),
        "gates": stats.gates,
        "pairs": stats.pairs,
        "data": stats.data,
        "versions": stats.versions,
        "parts": parts,
    }
    text = json.dumps(about, sort_keys=True)
    write_file(path, safetensors.torch.save(tensors, {"reap": text}), overwrite=overwrite)


def load(path: str | PathLike[str]) -> Statistics:
    """See `Statistics.load`."""
    path = Path(path)
    header = read_header(path)
    about = _about(path, header.metadata)
    model = ModelInfo.from_json(about["model"])
    stats = Statistics(
        model,
        gates=about["gates"],
        pairs=about["pairs"],
        data=about["data"],
        versions=about["versions"],
    )
    parts = [
        (domain, f"{number}/{name}", model.layer(name))
        for number, (domain, names) in enumerate(sorted(about["parts"].items()))
        for name in names
    ]
    # Shapes come first: nothing is read or allocated on the word of a file that contradicts itself.
    expected = {
        f"{prefix}/{field}": shape
        for _, prefix, layer in parts
        for field, shape in _shapes(layer, about["pairs"]).items()
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
    for domain, prefix, layer in parts:
        state = {field: tensors[f"{prefix}/{field}"] for field in _shapes(layer, about["pairs"])}
        fault = _contradiction(state, layer)
        if fault:
            raise ReapError(f"{path} is damaged: domain {domain}, layer {layer.name}: {fault}")
        part = LayerStatistics.from_tensors(state, name=layer.name, gates=stats.gates)
        stats.put(domain, layer.name, part)
    return stats


def digest(stats: Statistics) -> str:
    """See `Statistics.digest`."""
    tensors, parts = _flatten(stats)
    about = [stats.model.to_json(), stats.gates, stats.pairs, parts]
    hashed = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    hashed.update(safetensors.torch.save(tensors))
    return hashed.hexdigest()


def _flatten(stats: Statistics) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    number = {domain: i for i, domain in enumerate(stats.domains)}
    tensors: dict[str, Tensor] = {}
    parts: dict[str, list[str]] = {domain: [] for domain in stats.domains}
    for (domain, layer), part in stats.parts().items():
        parts[domain].append(layer)
        for field, tensor in part.tensors().items():
            tensors[f"{number[domain]}/{layer}/{field}"] = tensor
    return tensors, parts


def _about(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """The JSON object in the metadata, its outer shape checked."""
    if "reap" not in metadata:
        raise ReapError(f"{path} holds no statistics: it was not written by `reap calibrate`")
    about = parse_json(metadata["reap"].encode(), f"the metadata of {path}")
    if about.get("format") != FORMAT:
        raise ReapError(f"{path} holds no statistics: its format is {about.get('format')!r}")
    if about.get("version") != VERSION:
        raise ReapError(
            f"{path} has format version {about.get('version')!r}: "
            f"this program reads version {VERSION}"
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
