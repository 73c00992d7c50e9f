"""Hidden states of suspended batches, in a file where memory does not hold them."""

from __future__ import annotations

import ctypes
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from reap.errors import ReapError
from reap.files.units import sized


class HiddenFile:
    """A file without a name in `folder`, of `size` bytes that the disk has set aside: it is gone with
    this process, however that ends. ReapError when the disk has not that much."""

    def __init__(self, folder: Path, size: int) -> None:
        self._size = size
        self._used = 0
        try:
            self._file = tempfile.TemporaryFile(dir=folder)
            os.posix_fallocate(self._file.fileno(), 0, max(1, size))
        except OSError as error:
            raise ReapError(
                f"{folder} has no room for {sized(size)} of hidden states ({error.strerror}): "
                "fewer tokens at a time (--wave-tokens) need less"
            ) from error

    def close(self) -> None:
        self._file.close()

    def clear(self) -> None:
        """All of it may be used again."""
        self._used = 0

    def place(self, size: int) -> int | None:
        """The offset of `size` bytes of the file; None when no more are left."""
        if size > self._size - self._used:
            return None
        offset, self._used = self._used, self._used + size
        return offset

    def put(self, tensor: Tensor, offset: int) -> None:
        """Move the memory of `tensor` into the file: until `get`, it has none."""
        storage = tensor.untyped_storage()
        memory, done = _memory(storage), 0
        while done < len(memory):
            done += os.pwrite(self._file.fileno(), memory[done:], offset + done)
        storage.resize_(0)

    def get(self, tensor: Tensor, size: int, offset: int) -> None:
        """Undo `put` of a tensor whose memory had `size` bytes."""
        storage = tensor.untyped_storage()
        storage.resize_(size)
        memory, done = _memory(storage), 0
        while done < size:
            got = os.preadv(self._file.fileno(), [memory[done:]], offset + done)
            if got == 0:
                raise ReapError("the file of hidden states became shorter: start again")
            done += got


def _memory(storage: torch.UntypedStorage) -> memoryview:
    """By address: a storage that numpy has seen cannot be resized again."""
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
