"""A model of which only some layers are in memory: each is read from the checkpoint when it is
needed, and dropped.

A unit is what is read and dropped at once: one entry of a list of layers. The lists with experts
are split so, and those of the towers for other than text, which are never needed. What lies outside
of them, the embeddings say, stays in memory; what only the language-model head has is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from reap.errors import ReapError
from reap.files.folder import open_folder
from reap.model import compat
from reap.model.experts import OTHER_TOWERS, find_experts, pretrained
from reap.model.load import from_folder
from reap.model.staging import Queues, Sent, Staging
from reap.model.stored import Once
from reap.model.unpacked import Unpacked, open_stored

# What may be asked of a weight that is not in memory.
FACTS = {
    *("shape", "dtype", "device", "layout", "ndim", "nbytes", "itemsize", "names"),
    *("is_meta", "is_cpu", "is_cuda", "is_sparse", "is_quantized", "is_nested"),
    *("is_leaf", "requires_grad", "grad_fn", "__repr__"),
    *("size", "dim", "numel", "nelement", "element_size", "stride", "is_contiguous"),
    *("is_floating_point", "is_complex", "__hash__", "__len__", "requires_grad_"),
}


class Away(nn.Parameter):
    """Stands for a weight that is not in memory: it has its shape and so on, and whatever computes
    with it is told so. (torch itself may take one on the meta device for one of no value.)"""

    name = ""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = getattr(func, "__self__", None)  # of the reading of an attribute, that
        if getattr(own, "__name__", func.__name__) in FACTS:
            return super().__torch_function__(func, types, args, kwargs or {})
        if func.__name__ == "detach":
            return args[0]
        away = next((x for x in args if isinstance(x, cls)), None)
        raise ReapError(
            f"{getattr(away, 'name', 'a weight')} is used outside of its layer's own call "
            f"({func.__name__}): such a model cannot be run layer by layer"
        )


class Weight(NamedTuple):
    """A weight of a unit: what stands for it while it is not here, and wherever it belongs."""

    name: str
    away: Away
    homes: tuple[tuple[nn.Module, str], ...]  # also in other units, where it is shared

    def put(self, value: nn.Parameter) -> None:
        for module, name in self.homes:
            module._parameters[name] = value


class Needs(NamedTuple):
    """Bytes of memory that running a model layer by layer takes."""

    stays: int
    layer: int  # while the largest layer is loaded
    name: str  # of that layer


@dataclass(eq=False)
class Unit:
    """One entry of a list of layers."""

    name: str  # of the module
    module: nn.Module
    weights: tuple[Weight, ...]
    keys: tuple[str, ...]  # of the checkpoint, that its weights are made of
    has_experts: bool

    @property
    def nbytes(self) -> int:
        """Of its weights in memory."""
        return sum(weight.away.nbytes for weight in self.weights)


class Layerwise:
    """The model in `folder`, in eval mode and on the CPU, without the weights of its units; those
    of one are there inside `with layers.loaded(unit)`. `text`: the units that text goes through.
    With the `queues` of a GPU it is there instead, and reads and converts on the CPU.

    dtype and trust_remote_code are those of `load_model`, and so are the errors. ReapError also for
    a model whose layers are in no list, or compute with packed weights, and later for a file that
    is not what it was. `admit` is called before any weight is read, and may raise.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        admit: Callable[[Needs], None] = lambda _: None,
        queues: Queues | None = None,
    ) -> None:
        compat.require(compat.STREAMING)
        self._admit = admit
        self._stored = open_stored(open_folder(folder))
        self._first: dict[str, str] = {}  # a weight's names -> its first
        self._keys: dict[str, list[str]] = {}  # a weight's first name -> what it is made of
        self._loader = compat.PartLoader(self._choose)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reap-reader")
        self._ahead: tuple[Unit, Future[dict[str, Once]]] | None = None
        self._sent: tuple[Unit, Sent] | None = None
        self.staging = None if queues is None else Staging(queues)
        self.model = from_folder(
            folder, dtype, trust_remote_code, self._loader.installed(), stored=self._stored
        )
        if compat.is_quantised(self.model):
            raise ReapError(
                f"{folder} is quantised, and transformers computes with its packed weights: such "
                "a model cannot be run layer by layer"
            )
        if queues is not None:
            _move(self.model, queues.device)
        self.units = self._units()
        self.text = tuple(unit for unit in self.units if not OTHER_TOWERS.search(unit.name))

    def stored(self, unit: Unit) -> int:
        """Bytes of the checkpoint that its weights are made of."""
        return self._stored.nbytes(unit.keys)

    def close(self) -> None:
        """Ends the reading ahead."""
        self._stored.stop()
        self._reader.shutdown(cancel_futures=True)

    @contextmanager
    def loaded(self, unit: Unit) -> Iterator[None]:
        """Its weights are in memory inside the `with`; read ahead, if that is what was asked."""
        try:
            if self.staging is None:
                self._load(unit, self._read(unit))
            else:
                self._take(unit, self.staging)
            yield
        finally:
            for weight in unit.weights:
                weight.put(weight.away)
            if self.staging is not None:
                self.staging.drop()

    def _read(self, unit: Unit) -> dict[str, Once]:
        """What is stored of it; read ahead, if that is what was asked."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] is unit:
            return ahead[1].result()
        del ahead
        return self._stored.read(unit.keys)

    def send_ahead(self) -> None:
        """What is read ahead is copied to the GPU, once it is read; what runs there goes on."""
        if self.staging is not None and self._ahead is not None:
            self._send(self._ahead[0], self.staging)

    def _send(self, unit: Unit, staging: Staging) -> Sent:
        try:
            made = self._load(unit, self._read(unit))
            sent = staging.send(made)
        finally:
            for weight in unit.weights:
                weight.put(weight.away)
        self._sent = unit, sent
        return sent

    def _take(self, unit: Unit, staging: Staging) -> None:
        sent, self._sent = self._sent, None
        if sent is None or sent[0] is not unit:
            del sent
            taken = staging.take(self._send(unit, staging))
            self._sent = None
        else:
            taken = staging.take(sent[1])
        for weight, tensor in zip(unit.weights, taken, strict=True):
            weight.put(nn.Parameter(tensor, requires_grad=False))

    def read_ahead(self, unit: Unit) -> None:
        """Begin to read what `loaded(unit)` will need, in a thread."""
        if self._ahead is None or self._ahead[0] is not unit:
            self._ahead = unit, self._reader.submit(self._stored.read, unit.keys)

    def _load(self, unit: Unit, tensors: dict[str, Once]) -> list[nn.Parameter]:
        """Its weights, which are where they belong."""
        try:
            self._loader.load(tensors)
        except ReapError as error:
            failed = self._stored.failed if isinstance(self._stored, Unpacked) else None
            raise failed or error from error
        loaded = []
        for weight in unit.weights:
            found = (module._parameters[name] for module, name in weight.homes)
            made = next((value for value in found if value is not None and not value.is_meta), None)
            if made is None:
                raise ReapError(f"{weight.name} was not loaded with its layer")
            weight.put(made)
            loaded.append(made)
        return loaded

    def _choose(self, model: nn.Module, names: dict[str, str]) -> compat.Part:
        """What stays: the weights outside of units and head, with those that they share, and all
        buffers, which may hold a state."""
        self._first = first = _first_names(model)
        places = [*_places(model), *_head(model)]
        inside = {name for name in model.state_dict() if _place(name, places) is not None}
        shared = {name for weight, name in first.items() if weight not in inside}
        away = {name for name in inside & first.keys() if first[name] not in shared}
        here = model.state_dict().keys() - away
        for key, name in names.items():
            if name in away:
                self._keys.setdefault(first[name], []).append(key)
        _check_twice(model, away, set(names.values()))
        stay = {key for key, name in names.items() if name in here}
        self._admit(self._needs(model, away, self._stored.nbytes(stay)))
        tensors = self._stored.read(stay) | self._stored.on_meta(names.keys() - stay)
        where = dict.fromkeys(places, "meta") | dict.fromkeys(inside - away, "cpu")
        return compat.Part(tensors, where)

    def _needs(self, model: nn.Module, away: set[str], stays: int) -> Needs:
        largest = Needs(stays, 0, "")
        for place in (place for place in _places(model) if not OTHER_TOWERS.search(place)):
            names = {name for name in away if _place(name, [place]) is not None}
            made = sum(model.get_parameter(name).nbytes for name in names)
            firsts = {self._first[name] for name in names}
            stored = self._stored.nbytes(key for one in firsts for key in self._keys.get(one, ()))
            # What is read, what is made of it, and what unpacking takes on the way.
            layer = stored + made + (made if stored < made else 0)
            largest = max(largest, Needs(stays, layer, place), key=lambda needs: needs.layer)
        return largest

    def _units(self) -> tuple[Unit, ...]:
        """What there is to load; all that is on the meta device is marked as away."""
        homes: dict[nn.Parameter, list[tuple[nn.Module, str, str]]] = {}
        for path, module in self.model.named_modules():
            for name, weight in module._parameters.items():
                if weight is not None and weight.is_meta:
                    full = f"{path}.{name}" if path else name
                    homes.setdefault(weight, []).append((module, name, full))
        weights: dict[str, Weight] = {}
        for weight, places in homes.items():
            away = Away(weight, requires_grad=False)
            away.name = places[0][2]
            one = Weight(away.name, away, tuple(place[:2] for place in places))
            one.put(away)
            weights |= {full: one for _, _, full in places}
        experts = _experts(self.model)
        units: dict[int, Unit] = {}
        for place in _places(self.model):
            entry = self.model.get_submodule(place)
            own = [one for name, one in weights.items() if _place(name, [place]) is not None]
            keys = (key for one in own for key in self._keys.get(self._first[one.name], ()))
            has_experts = any(name.startswith(f"{place}.") for name in experts)
            unit = Unit(place, entry, tuple(own), tuple(dict.fromkeys(keys)), has_experts)
            units.setdefault(id(entry), unit)
        return tuple(units.values())


def _move(model: nn.Module, device: torch.device) -> None:
    """All that is not on the meta device; what is shared stays so."""
    with torch.inference_mode(False), torch.no_grad():
        for weight in model.parameters():
            if not weight.is_meta:
                weight.data = weight.data.to(device)
        for module in model.modules():
            for name, value in list(module.named_buffers(recurse=False, remove_duplicate=False)):
                if not value.is_meta:
                    setattr(module, name, value.to(device))


def _places(model: nn.Module) -> list[str]:
    """The names of the entries of the outermost lists that hold experts, or are of other towers."""
    experts = _experts(model)
    places: list[str] = []
    lists: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.ModuleList) or _place(name, lists) is not None:
            continue
        if OTHER_TOWERS.search(name) or any(one.startswith(f"{name}.") for one in experts):
            lists.append(name)
            places += [f"{name}.{entry}" for entry in range(len(module))]
    loose = [one for one in experts if _place(one, places) is None]
    if loose:
        raise ReapError(
            f"{type(model).__name__} cannot be run layer by layer: its experts {loose[0]} are in "
            "no list of layers"
        )
    return places


def _experts(model: nn.Module) -> list[str]:
    """The names of all modules of experts, also of those that share their weights."""
    found = {id(one.module) for one in find_experts(model)}
    return [
        name for name, module in model.named_modules(remove_duplicate=False) if id(module) in found
    ]


def _head(model: nn.Module) -> list[str]:
    """The modules beside the base model, which is what runs."""
    base = pretrained(model).base_model
    return [name for name, child in model.named_children() if base not in (child, model)]


def _place(name: str, places: Iterable[str]) -> str | None:
    return next((place for place in places if name.startswith(f"{place}.")), None)


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a weight -> the first name of the same weight, or of the one that it is tied
    to."""
    names: dict[int, str] = {}
    first = {
        name: names.setdefault(id(weight), name)
        for name, weight in model.named_parameters(remove_duplicate=False)
    }
    for target, source in compat.ties(model).items():
        if target in first and source in first:
            old, new = first[target], first[source]
            first = {name: new if one == old else one for name, one in first.items()}
    return first


def _check_twice(model: nn.Module, away: set[str], stored: set[str]) -> None:
    """ReapError for weights of units that are said to be one, and are stored twice: whether they
    are equal would decide."""
    for target, source in compat.ties(model).items():
        if {target, source} <= away & stored:
            raise ReapError(
                f"{target} and {source} are tied, but the checkpoint has both: such a model cannot "
                "be run layer by layer"
            )
