"""A quantised checkpoint as if it had been saved unquantised: its weights are decoded, one at a
time, as they are read. transformers loads them into the plain model, which our kernels run; it
needs none of the formats' packages for that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reap.errors import ReapError
from reap.files.folder import Folder
from reap.files.safefile import Header
from reap.model import decoding, formats
from reap.model.packed import Entries, Packing, Weight, unpacking
from reap.model.stored import DTYPES, Once, Stored

_MARK = "reap_stored_as"  # on a model that was dequantised as it was loaded
# Of packages whose module has another name.
_MODULES = {"optimum-quanto": "optimum.quanto", "amd-quark": "quark", "fbgemm-gpu": "fbgemm_gpu"}


class Decoded(Once):
    """A weight that is decoded when it is asked for, once, of tensors that were read."""

    def __init__(self, weight: Weight, parts: Mapping[str, Once], owner: Unpacked) -> None:
        self._weight, self._parts, self._owner = weight, dict(parts), owner
        self._dtype, self._shape = weight.dtype, list(weight.shape)

    def __getitem__(self, whole: Any) -> Tensor:
        assert self._parts and whole is Ellipsis
        parts = {part: tensor[...] for part, tensor in self._parts.items()}
        self._parts = {}
        try:
            with torch.inference_mode(False), torch.no_grad():
                return self._weight.decode(
                    parts, self._weight.shape, **self._owner.rounding(self._weight)
                )
        except ReapError as error:
            packed = self._weight.parts["weight"]
            self._owner.failed = ReapError(f"{packed} {error}")
            raise self._owner.failed from error


class Later(Once):
    """A tensor that is read when it is asked for."""

    def __init__(self, owner: Stored, name: str, dtype: str, shape: Iterable[int]) -> None:
        self._owner, self._name = owner, name
        self._dtype, self._shape = dtype, list(shape)

    def __getitem__(self, whole: Any) -> Tensor:
        found = self._owner.read([self._name])[self._name][...]
        return found if whole is Ellipsis else found[whole]


class Unpacked(Stored):
    """The tensors in `shards`, of which those that `packing` makes weights of go by the weights'
    names. `failed` is what was wrong with a weight that could not be decoded."""

    def __init__(self, shards: Iterable[Header], packing: Packing) -> None:
        super().__init__(shards)
        self.packing = packing
        self.failed: ReapError | None = None
        self.into: torch.dtype | None = None  # of all weights of the model

    @property
    def said(self) -> str:
        return f"{self.packing.said}, dequantised"

    def rounding(self, weight: Weight) -> dict[str, torch.dtype]:
        """For `weight.decode`: what the loader would round its fp32 to anyway."""
        kind = getattr(weight.decode, "func", None)
        if self.into is None or weight.dtype != "F32" or kind not in decoding.ROUNDING:
            return {}
        return {"into": self.into}

    def settle(self, dtype: torch.dtype | None) -> None:
        self.into = dtype

    def nbytes(self, names: Iterable[str]) -> int:
        return super().nbytes(part for name in names for part in self._parts(name))

    def on_meta(self, names: Iterable[str]) -> dict[str, Tensor]:
        weights = self.packing.weights
        names = list(names)
        found = super().on_meta(name for name in names if name not in weights)
        for name in names:
            if name in weights:
                one = weights[name]
                found[name] = torch.empty(one.shape, dtype=DTYPES[one.dtype], device="meta")
        return found

    def read(self, names: Iterable[str]) -> dict[str, Once]:
        names = list(names)
        raw = super().read(part for name in names for part in self._parts(name))
        found: dict[str, Once] = {}
        for name in names:
            weight = self.packing.weights.get(name)
            if weight is None:
                found[name] = raw[name]
            else:
                parts = {part: raw[at] for part, at in weight.parts.items()}
                found[name] = Decoded(weight, parts, self)
        return found

    def state(self) -> dict[str, Later]:
        """All tensors, to be read when they are asked for."""
        return {name: Later(self, name, *entry) for name, entry in self.entries().items()}

    def entries(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return self.packing.entries({n: (t.dtype, t.shape) for n, (_, t) in self._where.items()})

    def _parts(self, name: str) -> Iterable[str]:
        weight = self.packing.weights.get(name)
        return (name,) if weight is None else weight.parts.values()


def open_stored(folder: Folder) -> Stored:
    """The tensors of a checkpoint, decoded where they are quantised. ReapError for a format that is
    neither read here nor by a package that is installed, and for one that is not what it says."""
    plain = Stored(folder.shards)
    settings = formats.settings_of(folder.config, folder.path)
    if settings is None:
        return plain
    form = formats.format_of(settings)
    if form is None:
        package = formats.package_of(settings)
        module = _MODULES.get(package, package.replace("-", "_"))
        if find_spec(module.partition(".")[0]) is None:
            raise ReapError(
                f"{folder.path} is quantised by {settings['quant_method']}, which is not read here "
                f"without its package (pip install {package}): or give the checkpoint that it was "
                "made of"
            )
        return plain

    def peek(name: str) -> list[int]:
        return plain.read([name])[name][...].tolist()

    entries = {name: (t.dtype, t.shape) for s in folder.shards for name, t in s.tensors.items()}
    try:
        return Unpacked(folder.shards, unpacking(form, entries, peek))
    except ReapError as error:
        raise ReapError(f"{folder.path} is no whole {settings['quant_method']}: {error}") from error


def unpacked_entries(
    config: Mapping[str, Any], entries: Entries, folder: Path | None = None
) -> Entries:
    """Names, data types and shapes of a checkpoint as they are once it is decoded; as they were
    where that is not known."""
    try:
        settings = formats.settings_of(config, folder)
        form = None if settings is None else formats.format_of(settings)
        return entries if form is None else unpacking(form, entries).entries(entries)
    except ReapError:
        return entries


def said_of_folder(folder: Folder) -> str | None:
    """How the weights in a folder are quantised, and whether they are dequantised as they are
    loaded, for people; None where they are not. ReapError as `open_stored`."""
    stored = open_stored(folder)
    if isinstance(stored, Unpacked):
        return stored.said
    settings = formats.settings_of(folder.config, folder.path)
    return None if settings is None else str(settings["quant_method"])


def mark(model: nn.Module, stored: Stored) -> None:
    """Notes on a model, and the model inside of it, how its weights were stored."""
    if isinstance(stored, Unpacked):
        for module in (model, getattr(model, "base_model", model)):
            setattr(module, _MARK, stored.said)


def said_of_model(model: nn.Module) -> str | None:
    """How the weights of a model were stored that was dequantised as it was loaded."""
    return getattr(model, _MARK, None)
