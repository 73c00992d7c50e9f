"""What each token chose, for research that no sums serve: a trace of the first tokens that count.

A file of safetensors, of each layer of the model "LAYER/ids" [n,K] int32 (-1 for a slot of no
expert), "LAYER/gates" and "LAYER/norms" [n,K] fp32, and "LAYER/places" [n,3] int32: the number of
the layer's call, the row in it and the column. Row i of all four is one token. Metadata "reap" is
one JSON object: format, version, model and gates.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reap.errors import ReapError
from reap.files.atomic import write_file
from reap.files.outputs import TRACE, check_file
from reap.files.paths import path_of
from reap.files.safefile import encode_header, parse_json, read_header
from reap.files.units import sized
from reap.model.info import LayerInfo, ModelInfo

VERSION = 1
FIELDS = {"gates": "F32", "ids": "I32", "norms": "F32", "places": "I32"}  # in the file's order
_PIECE = 1 << 20  # bytes at a time


@dataclass
class _Rows:
    """Of one layer, in the file that has no name: where each field's rows begin, and how many
    there are."""

    info: LayerInfo
    starts: dict[str, int]
    rows: int = 0
    calls: int = 0

    def width(self, name: str) -> int:
        return 3 if name == "places" else self.info.top_k


@dataclass
class Trace:
    """A trace of the first `tokens` tokens that count, in every layer, to be written to `path`:
    give it to `observe` or `calibrate`, once. ReapError for a file that is there, unless
    `overwrite`, and for a number of tokens that makes no sense.

    While it is recorded it lies in a file without a name in the folder of `path`, and is written at
    the end of the `observe`: whole, and not at all when that ends in an error. On a GPU every layer
    waits for the device until the trace is full.
    """

    path: str | PathLike[str]
    tokens: int = 65_536
    overwrite: bool = False
    _layers: dict[str, _Rows] = field(default_factory=dict, init=False, repr=False)
    _spool: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        path_of(self.path, "path", "the trace to write")
        if type(self.tokens) is not int or not 1 <= self.tokens < 1 << 31:
            raise ReapError(
                f"a trace of {self.tokens!r} tokens: it must be a whole number of 1 or more"
            )
        check_file(self.path, TRACE, overwrite=self.overwrite)

    def begin(self, model: ModelInfo, gates: str) -> None:
        """Make room. ReapError where the disk has none, and for a trace that was begun before."""
        if self._spool is not None:
            raise ReapError("a trace is of one observe: make another for the next")
        offset = 0
        for info in model.layers:
            rows = _Rows(info, {})
            for name in FIELDS:
                rows.starts[name] = offset
                offset += self.tokens * 4 * rows.width(name)
            self._layers[info.name] = rows
        self._about = {
            "format": TRACE,
            "version": VERSION,
            "model": model.to_json(),
            "gates": gates,
        }
        try:
            self._spool = tempfile.TemporaryFile(dir=Path(self.path).absolute().parent)
            self._spool.truncate(offset)
        except OSError as error:
            raise ReapError(
                f"a trace of {sized(offset)} beside {self.path}: {error.strerror}"
            ) from None

    def add(
        self,
        layer: str,
        ids: Tensor,  # [T,K] int
        gates: Tensor,  # [T,K]
        norms: Tensor,  # [T,K]
        mask: Tensor | None,  # [T] bool
        shape: tuple[int, int] | None,  # [B,L] of the call's tokens, if known
    ) -> None:
        """One call of a layer, of whose tokens those count where `mask` is True."""
        rows = self._layers[layer]
        call, rows.calls = rows.calls, rows.calls + 1
        room = self.tokens - rows.rows
        if room == 0 or len(ids) == 0:
            return
        length = shape[1] if shape is not None and shape[0] * shape[1] == len(ids) else len(ids)
        place = torch.arange(len(ids), device=ids.device)
        if mask is not None:
            place = place[mask.to(ids.device)]
        place = place[:room]
        ids = torch.where((ids >= 0) & (ids < rows.info.num_experts), ids, -1)[place]
        lacking = rows.info.top_k - ids.shape[1]
        columns = {
            "ids": _filled(ids.to(torch.int32), lacking, -1),
            "gates": _filled(gates[place].float(), lacking, 0),
            "norms": _filled(norms[place].float(), lacking, 0),
            "places": torch.stack(
                [torch.full_like(place, call), place // length, place % length], 1
            ).to(torch.int32),
        }
        for name, values in columns.items():
            self._spool.seek(rows.starts[name] + rows.rows * 4 * rows.width(name))
            self._write(values.detach().cpu().contiguous().numpy().tobytes())
        rows.rows += len(place)

    def _write(self, data: bytes) -> None:
        try:
            self._spool.write(data)
        except OSError as error:
            raise ReapError(f"cannot write the trace {self.path}: {error.strerror}") from error

    def save(self) -> None:
        """Write the file. ReapError when that cannot be."""
        write_file(self.path, self._pieces(), overwrite=self.overwrite)

    def close(self) -> None:
        """What was recorded is gone, unless it was saved."""
        if self._spool is not None:
            self._spool.close()

    def _pieces(self) -> Iterator[bytes]:
        order = [(rows, name) for _, rows in sorted(self._layers.items()) for name in FIELDS]
        yield encode_header(
            {
                f"{rows.info.name}/{name}": (FIELDS[name], (rows.rows, rows.width(name)))
                for rows, name in order
            },
            {"reap": json.dumps(self._about, sort_keys=True)},
        )
        for rows, name in order:
            self._spool.seek(rows.starts[name])
            left = rows.rows * 4 * rows.width(name)
            while left:
                piece = self._spool.read(min(left, _PIECE))
                left -= len(piece)
                yield piece


def read_about(path: Path) -> tuple[ModelInfo, str, int]:
    """Model, gates and the most tokens of a layer of a trace. ReapError for another file."""
    header = read_header(path)
    about = parse_json(
        header.metadata.get("reap", "{}").encode(errors="surrogatepass"), f"the metadata of {path}"
    )
    if about.get("format") != TRACE or about.get("version") != VERSION:
        raise ReapError(
            f"{path} is no trace of version {VERSION}: its format is {about.get('format')!r}, its "
            f"version {about.get('version')!r}"
        )
    gates = about.get("gates")
    if not isinstance(gates, str):
        raise ReapError(f"{path}: metadata field 'gates' must be a string")
    ids = [entry.shape for name, entry in header.tensors.items() if name.endswith("/ids")]
    tokens = max((shape[0] for shape in ids if shape), default=0)
    return ModelInfo.from_json(about.get("model")), gates, tokens


def trace_size(model: ModelInfo, tokens: int) -> int:
    """Bytes of a trace of so many tokens."""
    return sum(tokens * 4 * (3 * layer.top_k + 3) for layer in model.layers)


def _filled(values: Tensor, columns: int, value: float) -> Tensor:
    """With so many columns more, of `value`."""
    return torch.nn.functional.pad(values, (0, max(0, columns)), value=value)
