"""What a criterion divides, and by what, of the experts of all layers: exact sums of some batches.

    [2,C] whole numbers, as numpy objects; C experts, one layer after another

Counts are themselves, other sums in units of 2**-320. Exact, so that they can be of several
processes, or of batches whose layers ran at different times, and are rounded once, when all are
added.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reap.model.info import LayerInfo, ModelInfo
from reap.planning.confidence import RATIOS
from reap.statistics.exact import FRACTION_BITS
from reap.statistics.stats import Statistics

WHOLE = ("count", "tokens")  # fields that are whole numbers already
_BYTES = 80  # of a sum, as it is written


class Exact:
    """Reads the sums of a criterion out of the statistics of a model."""

    def __init__(self, model: ModelInfo, criterion: str) -> None:
        self.model = model
        self.fields = RATIOS[criterion]
        ends = np.cumsum([layer.num_experts for layer in model.layers])
        self._places = {
            layer.name: slice(end - layer.num_experts, end)
            for layer, end in zip(model.layers, map(int, ends), strict=True)
        }
        self.experts = int(ends[-1])

    def none(self) -> np.ndarray:
        """The sums of no batches."""
        return np.full((2, self.experts), 0, dtype=object)

    def read(self, parts: Sequence[Statistics]) -> np.ndarray:
        """Those of the sum of `parts`."""
        found = self.none()
        for layer in self.model.layers:
            found[:, self._places[layer.name]] = self.of_layer(parts, layer)
        return found

    def of_layer(self, parts: Sequence[Statistics], layer: LayerInfo) -> np.ndarray:
        """[2,E]"""
        return np.array([_sums(parts, layer, field) for field in self.fields], dtype=object)

    def place(self, layer: str) -> slice:
        """Where its experts are among all."""
        return self._places[layer]

    def rounded(self, sums: np.ndarray) -> Tensor:
        """[2,C] fp64, each rounded once."""
        unit = 1 << FRACTION_BITS
        rows = (
            row if field in WHOLE else [total / unit for total in row]
            for field, row in zip(self.fields, sums.tolist(), strict=True)
        )
        return torch.tensor([[float(total) for total in row] for row in rows], dtype=torch.float64)

    def written(self, sums: np.ndarray) -> str:
        """As text, for a file or another process."""
        rows = b"".join(int(total).to_bytes(_BYTES, "little", signed=True) for total in sums.flat)
        return base64.b64encode(zlib.compress(rows, 1)).decode()

    def parsed(self, text: Any) -> np.ndarray:
        """What `written` made. ValueError or TypeError for anything else."""
        try:
            rows = zlib.decompress(base64.b64decode(text, validate=True))
        except zlib.error as error:
            raise ValueError("these are no sums") from error
        if len(rows) != 2 * self.experts * _BYTES:
            raise ValueError("these are sums of other experts")
        found = self.none()
        found.flat[:] = [
            int.from_bytes(rows[start : start + _BYTES], "little", signed=True)
            for start in range(0, len(rows), _BYTES)
        ]
        return found


class ByCut:
    """What batches add to the sums, by the cut that they are before. They may run through their
    layers in any order: layers are read one by one, as they change."""

    def __init__(self, exact: Exact, stats: Statistics, before: np.ndarray) -> None:
        """`before`: what was summed in earlier runs."""
        self._exact, self._stats = exact, stats
        self._layers = {layer.name: layer for layer in exact.model.layers}
        self._now = exact.none()  # of these statistics
        self._total = before  # of all cuts that were taken
        self._cuts: dict[int, np.ndarray] = {}

    def ran(self, cut: int) -> None:
        """What was summed since this was called before is of batches in front of `cut`."""
        for name in self._stats.updated():
            place = self._exact.place(name)
            now = self._exact.of_layer([self._stats], self._layers[name])
            own = self._cuts.setdefault(cut, self._exact.none())
            own[:, place] += now - self._now[:, place]
            self._now[:, place] = now

    def take(self, cut: int | None = None) -> np.ndarray:
        """All that is in front of `cut`, when that is whole; without, of what was taken."""
        self._total = self._total + self._cuts.pop(cut, 0) if cut is not None else self._total
        return self._total


def _sums(parts: Sequence[Statistics], layer: LayerInfo, field: str) -> list[int]:
    """[E]"""
    own = [part for stats in parts for part in stats.parts(layer.name)]
    if field == "tokens":
        return [sum(part.tokens for part in own)] * layer.num_experts
    columns = [part.count.tolist() if field == "count" else part.exact(field) for part in own]
    return [sum(column) for column in zip(*columns, strict=True)] or [0] * layer.num_experts
