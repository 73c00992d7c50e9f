"""The file of statistics: safetensors, so that any tool can read it without running code.

Metadata "reap" is one JSON object: format, version, model, gates, pairs, data, versions, and
`parts`, the names of the layers observed per domain; `outputs`, `coalitions` and `logits` where
they are recorded. Domain number d (sorted) and layer own the
tensors "d/layer/field" that `LayerStatistics.tensors` describes: sums are stored exactly, in units
of 2**-320.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from reap.errors import ReapError
from reap.files.atomic import write_file
from reap.files.kinds import kind_of
from reap.files.outputs import STATISTICS, check_file
from reap.files.paths import path_of
from reap.files.safefile import Header, OpenFile, encode_header, parse_json, read_header
from reap.model.info import LayerInfo, ModelInfo
from reap.statistics import logitsums, setcounts, slotsums
from reap.statistics.exact import LIMBS
from reap.statistics.fixed import contradiction
from reap.statistics.joining import numbers_of
from reap.statistics.layerstats import PAIRS, SUMS, LayerStatistics
from reap.statistics.lazyrows import LazyRows
from reap.statistics.setcounts import check_coalitions

FORMAT = STATISTICS
# Of statistics with outputs, coalitions or logits; others are written as 2, which older programs
# read.
VERSION = 3
DTYPES = {"I64": torch.int64, "F32": torch.float32, "I32": torch.int32}
PAIRS_AT_ONCE = 1 << 12  # read and judged together
VALUES_AT_ONCE = 1 << 20
READS = (1, 2, 3)  # 1 has no structure of the model

_KINDS = {
    "model": dict,
    "gates": str,
    "pairs": bool,
    "data": list,
    "versions": dict,
    "parts": dict,
}


NEWER = {"outputs": bool, "coalitions": int, "logits": bool}  # absent where not recorded


@dataclass(frozen=True)
class State:
    """What a file holds. `parts`: (domain, layer) -> the layer's statistics."""

    model: ModelInfo
    gates: str
    kinds: Mapping[str, Any]  # pairs, outputs, coalitions, logits
    data: list[dict[str, Any]]
    versions: dict[str, str]
    parts: Mapping[tuple[str, str], LayerStatistics]


def write(state: State, path: str | PathLike[str], *, overwrite: bool = False) -> None:
    """Whole or not at all. ReapError if `path` exists or cannot be written.

    `overwrite` replaces statistics alone.
    """
    path_of(path, "path", "the file to write")
    check_file(path, FORMAT, overwrite=overwrite)
    newer = {field: state.kinds[field] for field in NEWER if state.kinds[field]}
    about = {
        "format": FORMAT,
        "version": VERSION if newer else 2,
        "model": state.model.to_json(),
        "gates": state.gates,
        "pairs": state.kinds["pairs"],
        "data": state.data,
        "versions": state.versions,
        "parts": _layers(state),
        **newer,
    }
    text = json.dumps(about, sort_keys=True)
    write_file(path, _serialised(state, {"reap": text}), overwrite=overwrite)


def read(path: str | PathLike[str]) -> State:
    """What `write` wrote. ReapError for anything else, or for damage that can be seen."""
    path = path_of(path, "path", "a file of statistics")
    header = _header(path)
    about = _about(path, header.metadata)
    model = ModelInfo.from_json(about["model"], transformers=about["versions"].get("transformers"))
    kinds = {"pairs": about["pairs"]} | {field: about.get(field, NEWER[field]()) for field in NEWER}
    check_coalitions(kinds["coalitions"])
    places = [
        (domain, f"{number}/{name}", model.layer(name))
        for number, (domain, names) in enumerate(sorted(about["parts"].items()))
        for name in names
    ]
    # Shapes come first: nothing is read or allocated on the word of a file that contradicts itself.
    found = {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
    shapes = {
        prefix: _shapes(
            layer,
            kinds["pairs"],
            _widths(found, prefix) if kinds["outputs"] else {},
            _varying(found, prefix, layer, kinds),
        )
        for _, prefix, layer in places
    }
    expected = {
        f"{prefix}/{field}": shape
        for prefix, fields in shapes.items()
        for field, shape in fields.items()
    }
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ReapError(
                f"{path}: tensor {name!r} is {_show(found.get(name))}, "
                f"its metadata asks for {_show(expected.get(name))}"
            )
    file = OpenFile(path)
    if file.version != header.version:
        raise ReapError(f"{path} changed while it was read: start again when it is whole")
    parts = {}
    for domain, prefix, layer in places:
        part = {}
        for field, (dtype, shape) in shapes[prefix].items():
            offset = header.data + header.tensors[f"{prefix}/{field}"].start
            part[field] = LazyRows(file, offset, shape, DTYPES[dtype])
        fault = _contradiction(part, layer, kinds["coalitions"])
        if kinds["outputs"] and "output_sums" not in part and part["tokens"][:].any():
            fault = "it has tokens, and no sums of outputs"
        if fault:
            raise ReapError(f"{path} is damaged: domain {domain}, layer {layer.name}: {fault}")
        parts[domain, layer.name] = LayerStatistics.from_tensors(
            part,
            name=layer.name,
            gates=about["gates"],
            **{field: kinds[field] for field in NEWER},
        )
    return State(model, about["gates"], kinds, about["data"], about["versions"], parts)


def read_data(path: str | PathLike[str]) -> list[dict[str, Any]]:
    """The data entries of a file alone; ReapError as for `read`, without a look at the sums."""
    return _about(Path(path), _header(Path(path)).metadata)["data"]


def _header(path: Path) -> Header:
    """ReapError for a file of another kind, by its name."""
    kind = kind_of(path)
    if kind not in (None, "statistics", "weights of a model"):
        raise ReapError(
            f"{path} is {kind}, it holds no statistics: give a file that `reap calibrate` wrote"
        )
    return read_header(path)


def digest(state: State) -> str:
    """Hex SHA-256 of model, gates and every exact sum."""
    model = state.model.to_json()
    model.pop("transformers", None)  # says of no number how it came about
    about = [model, state.gates, state.kinds["pairs"], _layers(state)]
    newer = {field: state.kinds[field] for field in NEWER if state.kinds[field]}
    # As what has outputs alone was hashed before there was more.
    about += ["outputs"] if newer == {"outputs": True} else [newer] if newer else []
    hashed = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for piece in _serialised(state, {}):
        hashed.update(piece)
    return hashed.hexdigest()


def _layers(state: State) -> dict[str, list[str]]:
    """The layers of every domain, sorted."""
    layers: dict[str, list[str]] = {}
    for domain, layer in sorted(state.parts):
        layers.setdefault(domain, []).append(layer)
    return layers


def _serialised(state: State, metadata: dict[str, str]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, as the library writes them, a tensor at a time."""
    number = {domain: i for i, domain in enumerate(_layers(state))}
    infos = {layer.name: layer for layer in state.model.layers}
    # The library's order: wide elements first, those of one width by the rank of their dtype.
    order = list(DTYPES)
    found = sorted(
        (order.index(dtype), f"{number[domain]}/{layer}/{field}", shape, (domain, layer), field)
        for domain, layer in state.parts
        for field, (dtype, shape) in _shapes(
            infos[layer],
            state.kinds["pairs"],
            state.parts[domain, layer].widths,
            state.parts[domain, layer].varying,
        ).items()
    )
    yield encode_header({name: (order[i], shape) for i, name, shape, *_ in found}, metadata)
    for *_, key, field in found:
        tensor = state.parts[key].tensor(field).contiguous()
        yield memoryview(tensor.numpy()).cast("B") if tensor.numel() else b""


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
    newer = {field: kind for field, kind in NEWER.items() if field in about}
    for field, kind in (_KINDS | newer).items():
        if not isinstance(about.get(field), kind) or (kind is int and about[field] is True):
            raise ReapError(f"{path}: metadata field {field!r} must be a JSON {kind.__name__}")
    if not all(isinstance(spec, dict) for spec in about["data"]):
        raise ReapError(f"{path}: metadata field 'data' must be a list of objects")
    try:
        for spec in about["data"]:
            numbers_of(spec)
    except ReapError as error:
        raise ReapError(f"{path}: {error}") from None
    if not all(isinstance(text, str) for text in about["versions"].values()):
        raise ReapError(f"{path}: metadata field 'versions' must map names to strings")
    for domain, names in about["parts"].items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ReapError(f"{path}: metadata field 'parts' must map {domain!r} to layer names")
        if not names or len(set(names)) != len(names):
            raise ReapError(f"{path}: domain {domain!r} has no layers, or one of them twice")
    return about


def _widths(found: Mapping[str, tuple[str, tuple[int, ...]]], prefix: str) -> dict[str, int]:
    """Columns of a layer's sums of vectors, as the file has them: their own sizes say the rest."""
    named = {field: found.get(f"{prefix}/{field}") for field in slotsums.FIELDS}
    return {field: entry[1][-1] for field, entry in named.items() if entry and entry[1]}


def _varying(
    found: Mapping[str, tuple[str, tuple[int, ...]]],
    prefix: str,
    layer: LayerInfo,
    kinds: Mapping[str, Any],
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a file must have of a layer's coalitions and logits, as far as it has them: how many
    sets there are is theirs to say, and logits may be unknown."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    if kinds["logits"] and f"{prefix}/{logitsums.FIELD}" in found:
        shapes[logitsums.FIELD] = ("I64", (logitsums.cells(layer.num_experts), 2))
    if kinds["coalitions"]:
        _, stored = found.get(f"{prefix}/{setcounts.FIELDS[0]}", ("", ()))
        N, width = stored if len(stored) == 2 else (0, 0)
        N, width = min(N, kinds["coalitions"]), min(width, layer.top_k)
        sizes = ("I32", (N, width)), ("I64", (N,)), ("I64", (2,))
        shapes |= dict(zip(setcounts.FIELDS, sizes, strict=True))
    return shapes


def _shapes(
    layer: LayerInfo,
    pairs: bool,
    widths: Mapping[str, int],
    varying: Mapping[str, tuple[str, tuple[int, ...]]],
) -> dict[str, tuple[str, tuple[int, ...]]]:
    E = layer.num_experts
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "tokens": ("I64", (1,)),
        "count": ("I64", (E,)),
        "peak": ("F32", (E,)),
    }
    shapes.update({field: ("I32", (E, LIMBS)) for field in SUMS})
    shapes.update({field: ("I64", (E, 2, 2, width)) for field, width in widths.items()})
    if pairs:
        shapes["pair_count"] = ("I64", (E * (E - 1) // 2,))
        shapes["pair_sums"] = ("I32", (E * (E - 1) // 2, LIMBS))
    return shapes | dict(varying)


def _show(entry: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if entry is None else f"{entry[0]} {list(entry[1])}"


def _contradiction(stored: Mapping[str, LazyRows], layer: LayerInfo, coalitions: int) -> str | None:
    """What in the numbers cannot come from any tokens, or None."""
    many = (*PAIRS, *slotsums.FIELDS, *setcounts.FIELDS, logitsums.FIELD)
    state = {field: rows[:] for field, rows in stored.items() if field not in many}
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
    for field in slotsums.FIELDS:
        fault = _contradiction_of_vectors(stored, field, unrouted) if field in stored else None
        if fault:
            return fault
    if coalitions:
        sets = {field: stored[field][:] for field in setcounts.FIELDS}
        limits = layer.num_experts, coalitions, tokens, layer.top_k
        if fault := setcounts.contradiction(sets, *limits):
            return fault
    if logitsums.FIELD in stored and (fault := logitsums.contradiction(stored, tokens)):
        return fault
    return (
        _contradiction_of_pairs(stored, slots * (layer.top_k - 1) // 2)
        if PAIRS[0] in stored
        else None
    )


def _contradiction_of_vectors(
    stored: Mapping[str, LazyRows], field: str, unrouted: torch.Tensor
) -> str | None:
    rows = stored[field]
    at_once = max(1, VALUES_AT_ONCE // (4 * rows.shape[-1]))
    for start in range(0, len(rows), at_once):
        some = slice(start, start + at_once)
        read = rows[some]
        if read[unrouted[some]].any():
            return f"{field} is not zero for an expert without tokens"
        fault = contradiction(read)
        if fault:
            return f"{field} has {fault}"
    return None


def _contradiction_of_pairs(stored: Mapping[str, LazyRows], most: int) -> str | None:
    count, sums = (stored[field] for field in PAIRS)
    pairs = 0
    for start in range(0, len(count), PAIRS_AT_ONCE):
        some = slice(start, start + PAIRS_AT_ONCE)
        seen = count[some]
        pairs += sum(seen.tolist())
        if (seen < 0).any() or pairs > most:
            return "impossible counts of pairs"
        if sums[some][seen == 0].any():
            return "a pair without tokens has a sum that is not zero"
    return None
