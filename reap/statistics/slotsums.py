"""Per expert the sums over its slots of whole vectors: of its output, and of its inner channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from reap.errors import ReapError
from reap.statistics.fixed import LIMIT, FixedSum
from reap.statistics.lazyrows import LazyRows

FIELDS = ("output_sums", "channel_sums")  # of a file, each [E, 2, 2, width] int64


class SlotSums:
    """Of E experts, the sums of f(x) and of g * f(x) [2,E,H], and the same of the inner channels
    h = act(gate x) * up x [2,E,I]; None before the first call. Channels that one call did not
    bring are unknown from then on.

    Memory: 32 bytes per expert and column of either.
    """

    def __init__(self, experts: int, device: torch.device) -> None:
        self._experts, self._device = experts, device
        self._sums: dict[str, FixedSum] = {}
        self._lost = False  # calls without channels
        # Experts whose sums could not be added. Kept on the device, as faults of slots are.
        with torch.inference_mode(False):
            self.faulty = torch.zeros(experts, dtype=torch.bool, device=device)

    @classmethod
    def of(cls, experts: int, state: Mapping[str, Tensor | LazyRows]) -> SlotSums:
        """From what `tensors` gave, which nobody writes to any more."""
        self = cls(experts, torch.device("cpu"))
        for field in FIELDS:
            if field in state:
                stored = state[field]
                shape = (experts, 2, int(stored.shape[-1]))
                self._sums[field] = FixedSum.from_canonical(stored, shape)
        self._lost = "channel_sums" not in state and "output_sums" in state
        return self

    def add(self, name: str, outputs: Tensor, channels: Tensor | None) -> None:
        """Add the sums of a call, [2,E,H] and [2,E,I] of fp32 or fp64. An expert's that are NaN,
        infinite or too large count as zero; `check` then says so."""
        if channels is None:
            self._lose_channels()
        for field, values in zip(FIELDS, (outputs, channels), strict=True):
            if values is None or (self._lost and field == "channel_sums"):
                continue
            rows = values.to(self._device).movedim(0, 1)  # [E,2,width]
            bad = ~(rows.abs().amax(dim=(1, 2)) < LIMIT)  # NaN is none below it
            self.faulty |= bad
            if self._device.type != "cpu" or bool(bad.any()):  # elsewhere asking would wait
                rows = rows.masked_fill(bad[:, None, None], 0)
            self._sum(field, name, rows.shape[2]).add(rows)

    def check(self, name: str) -> None:
        """ReapError naming the layer and the expert if a sum so far could not be added."""
        for expert in self.faulty.nonzero().flatten().tolist():
            raise ReapError(
                f"layer {name}, expert {expert}: a sum of its outputs or inner channels is NaN, "
                "infinite or too large: check the model's weights and dtype"
            )

    def merge(self, other: SlotSums, name: str) -> None:
        """Add those of `other`. ReapError when they are of other sizes."""
        if other._lost:
            self._lose_channels()
        for field, theirs in other._sums.items():
            if field == "channel_sums" and self._lost:
                continue
            self._sum(field, name, theirs.shape[2]).merge(theirs)

    def read(self, field: str) -> Tensor | None:
        """[2,E,width] fp64 on the CPU, plain and gated; None for what is not known."""
        found = self._sums.get(field)
        return None if found is None else found.read().movedim(1, 0)

    def tensors(self) -> Iterator[tuple[str, int]]:
        """The fields that there are, and their widths."""
        for field in FIELDS:
            if field in self._sums:
                yield field, self._sums[field].shape[2]

    def tensor(self, field: str) -> Tensor:
        """[E, 2, 2, width] int64, of each expert whole and fraction, each plain and gated."""
        return self._sums[field].canonical()

    def _sum(self, field: str, name: str, width: int) -> FixedSum:
        shape = (self._experts, 2, width)
        found = self._sums.setdefault(field, FixedSum(shape, self._device))
        if found.shape != shape:
            raise ReapError(
                f"layer {name}: {field} of {width} columns against {found.shape[2]}: the experts "
                "of one layer differ in size"
            )
        return found

    def _lose_channels(self) -> None:
        self._lost = True
        self._sums.pop("channel_sums", None)
