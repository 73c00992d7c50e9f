"""Hidden states of suspended batches, in a file where memory does not hold them."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from reap.errors import ReapError
from reap.files.units import sized


class HiddenFile:
    """A file without a name in `folder`, of `size` bytes that the disk has set aside: it ends with
    this process, however that does. ReapError when the disk has not that much."""

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

    def place(self, size: int) -> Place | None:
        """`size` bytes of the file; None when so many are not left."""
        if size > self._size - self._used:
            return None
        offset, self._used = self._used, self._used + size
        return Place(self._file.fileno(), offset, size)


class Place:
    """Some bytes of the file."""

    def __init__(self, fd: int, offset: int, size: int) -> None:
        self._fd, self._offset, self._size = fd, offset, size

    @contextmanager
    def holds(self, tensor: Tensor) -> Iterator[None]:
        """The memory of `tensor`, and of all that share it, is in the file meanwhile; it stays
        where it is when it is too large, or not torch's own."""
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        if not (0 < size <= self._size and storage.resizable()):
            yield
            return
        done, memory = 0, _memory(storage)
        while done < size:
            done += os.pwrite(self._fd, memory[done:], self._offset + done)
        storage.resize_(0)
        try:
            yield
        finally:
            storage.resize_(size)
            done, memory = 0, _memory(storage)
            while done < size:
                got = os.preadv(self._fd, [memory[done:]], self._offset + done)
                if got == 0:
                    raise ReapError("the file of hidden states became shorter: start again")
                done += got


def _memory(storage: torch.UntypedStorage) -> memoryview:
    """By address: a storage that numpy has seen cannot be resized again."""
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
