"""Whether a model is calibrated in memory or layer by layer."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from reap.errors import ReapError
from reap.files.folder import open_folder
from reap.files.safefile import span
from reap.files.units import sized
from reap.model.load import find_device
from reap.model.unpacked import unpacked_entries
from reap.runs import memory

LOADING = 1.1  # of the weights: what else is there while a model is loaded
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}


def why_streamed(
    asked: bool | None, folder: Path, *, dtype: str, device: str, limit: int | None
) -> str | None:
    """Why the model in `folder` runs layer by layer, as a phrase; None when it is loaded whole.

    asked: None chooses; True and False are answers. limit: bytes of memory that it may take, files
    that are mapped included; None is what is free. ReapError where the answer is impossible.
    """
    device = find_device(device)
    if asked:
        check_streams(device)
        return "as asked for"
    if device != "cpu":
        return _too_large_for_gpu(asked, folder, dtype, device)
    need = whole(folder, dtype, limit)
    have = memory.allowed() if limit is None else limit
    if need <= have:
        return None
    if asked is False:
        raise ReapError(
            f"{folder.name} takes {sized(need)} of memory whole, of {sized(have)}: leave out "
            "--no-stream, and it runs layer by layer"
        )
    return f"whole it takes {sized(need)} of memory, of {sized(have)}"


def check_fits(*folders: Path, dtype: str, device: str) -> None:
    """ReapError where these models, loaded whole at once, do not fit in the memory that is free:
    the system would end the process without a word. GPUs say so themselves."""
    if find_device(device) != "cpu":
        return
    need = sum(round(_weights(folder, dtype)[1] * LOADING) for folder in folders)
    have = memory.allowed() - memory.resident()
    if need > have:
        names = " and ".join(folder.name for folder in folders)
        raise ReapError(
            f"{names} {'takes' if len(folders) == 1 else 'take'} {sized(need)} of memory, of "
            f"{sized(have)} that are free: use a machine with more, or --dtype bfloat16 where they "
            "are stored in 32 bits"
        )


def check_streams(device: str) -> None:
    """ReapError for a device that does not run layer by layer."""
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ReapError(
            f"layer by layer runs on the CPU or on one CUDA GPU, not on {device}: --device cpu or "
            "cuda"
        )


def _too_large_for_gpu(asked: bool | None, folder: Path, dtype: str, device: str) -> str | None:
    if not device.startswith("cuda"):  # spread over several, or none whose memory is known
        return None
    need, have = _weights(folder, dtype)[1], memory.meter_of(torch.device(device)).allowed()
    if round(need * LOADING) <= have:
        return None
    if asked is False:
        raise ReapError(
            f"{folder.name} has {sized(need)} of weights, and {device} has room for {sized(have)}: "
            "leave out --no-stream, and it runs layer by layer"
        )
    return f"its weights take {sized(need)}, and {device} has room for {sized(have)}"


def whole(folder: Path, dtype: str, limit: int | None = None) -> int:
    """Bytes of memory that this process takes when it has loaded the model in `folder` whole."""
    stored, made = _weights(folder, dtype)
    # A mapped file is memory to a control group until the system drops it.
    return memory.resident() + round(made * LOADING) + (stored if limit is not None else 0)


def _weights(folder: Path, dtype: str) -> tuple[int, int]:
    """Bytes of the weights in the folder's files and, about, in memory."""
    opened = open_folder(folder)
    tensors = {name: (t.dtype, t.shape) for s in opened.shards for name, t in s.tensors.items()}
    made = 0
    for name, (kind, shape) in unpacked_entries(opened.config, tensors, opened.path).items():
        if kind in ("BF16", "F16", "F32") and dtype in SIZES:
            made += math.prod(shape) * SIZES[dtype]
        elif tensors.get(name) == (kind, shape):
            made += span(kind, shape)
        else:  # decoded, to 16 bits: so are models that were quantised
            made += 2 * math.prod(shape)
    return sum(t.nbytes for s in opened.shards for t in s.tensors.values()), made
