"""Tensors that stay in their file until they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reap.files.safefile import OpenFile


class LazyRows:
    """A tensor of `shape` and `dtype` at a byte offset of a file: a slice of its rows is read, into
    memory of its own, at every `[...]`. Copies share it; a pickle has the tensor itself. ReapError,
    when read, for a file that changed."""

    def __init__(
        self, file: OpenFile, offset: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self._file, self._offset, self._shape, self._dtype = file, offset, shape, dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    def __len__(self) -> int:
        return self._shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError("only neighbouring rows are read")
        shape = (max(0, stop - start), *self._shape[1:])
        row = math.prod(self._shape[1:]) * self._dtype.itemsize
        if 0 in shape:
            return torch.empty(shape, dtype=self._dtype)
        data = self._file.read(self._offset + start * row, shape[0] * row)
        return torch.frombuffer(data, dtype=self._dtype).view(shape)

    def __deepcopy__(self, memo: Any) -> LazyRows:
        return self

    def __reduce__(self) -> tuple[Callable[[Tensor], Tensor], tuple[Tensor]]:
        return _itself, (self[:],)


def _itself(tensor: Tensor) -> Tensor:
    return tensor
