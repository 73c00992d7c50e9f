"""Statistics of a whole model: layers, domains, merging, files."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from reap import versions
from reap.errors import ReapError
from reap.files.units import counted
from reap.model.info import LayerInfo, ModelInfo
from reap.statistics import statsfile
from reap.statistics.gates import check_gates, read_gates
from reap.statistics.joining import joined
from reap.statistics.layerstats import KINDS, LayerStatistics, any_faults
from reap.statistics.setcounts import check_coalitions


class Statistics:
    """Statistics of every MoE layer of a model, per domain of text. `observe` yields one.

    `model` says whose they are, `gates` ("applied" or "renormalized") how gates were read, `data`
    which text went in (free-form JSON objects), `versions` which packages computed them.
    """

    def __init__(
        self,
        model: ModelInfo,
        *,
        gates: str = "applied",
        pairs: bool = False,
        outputs: bool = False,
        coalitions: int = 0,
        logits: bool = False,
        data: list[dict[str, Any]] | None = None,
        versions: dict[str, str] | None = None,
    ) -> None:
        check_gates(gates)
        check_coalitions(coalitions)
        self.model = model
        self.gates = gates
        self.pairs = pairs
        self.outputs = outputs
        self.coalitions = coalitions
        self.logits = logits
        self.data = list(data or [])
        self.versions = installed_versions() if versions is None else dict(versions)
        self._infos: dict[str, LayerInfo] = {layer.name: layer for layer in model.layers}
        self._parts: dict[tuple[str, str], LayerStatistics] = {}  # (domain, layer)
        self._updated: set[str] = set()  # layers
        self._domain = "default"
        self._counted: Tensor | None = None
        self._placed: dict[torch.device, Tensor] = {}  # the same, flat, where layers need it

    @property
    def kinds(self) -> dict[str, Any]:
        """What of the optional statistics is recorded: pairs, outputs, coalitions, logits."""
        return {field: getattr(self, field) for field in KINDS}

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the model's MoE layers, in its order."""
        return tuple(self._infos)

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains that were observed, sorted."""
        return tuple(sorted({domain for domain, _ in self._parts}))

    @property
    def tokens(self) -> int:
        """Tokens counted, by the layer that saw the most of them."""
        return self._most_tokens(self.domains)

    @property
    def domain_tokens(self) -> dict[str, int]:
        """`tokens` of every domain."""
        return {domain: self._most_tokens((domain,)) for domain in self.domains}

    def origin(self) -> dict[str, Any]:
        """What is recorded of these statistics where a choice was made by them, as JSON."""
        return {
            "tokens": self.tokens,
            "domains": self.domain_tokens,
            "gates": self.gates,
            "data": self.data,
            "statistics": self.digest(),
            "versions": self.versions,
        }

    @contextmanager
    def domain(self, name: str) -> Iterator[None]:
        """Updates inside the `with` go to domain `name`."""
        if not name:
            raise ReapError("a domain needs a name that is not empty")
        before, self._domain = self._domain, name
        try:
            yield
        finally:
            self._domain = before

    @contextmanager
    def counting(self, tokens: Tensor | None) -> Iterator[None]:
        """Of the calls inside the `with`, only tokens where `tokens` is not 0 count: [B,L] as the
        model's input_ids, or [T] as the experts get them, of any dtype. The others run, for the
        counted ones to attend to. None: all count. Padding never does.

        ReapError for anything else, and in a call with tokens of another shape."""
        if tokens is not None and not isinstance(tokens, Tensor):
            raise ReapError(
                f"counting was given a {type(tokens).__name__}: it must be a tensor, one value per "
                "token of the call, or None"
            )
        before = self._counted
        self._counted, self._placed = tokens, {}
        try:
            yield
        finally:
            self._counted, self._placed = before, {}

    @property
    def counted(self) -> Tensor | None:
        """What `counting` was given, inside it; None: all tokens count."""
        return self._counted

    def check_counted(self, shape: tuple[int, int] | None) -> None:
        """ReapError when what `counting` was given is not of tokens [B,L] shaped so."""
        tokens = self._counted
        if tokens is not None and tokens.dim() > 1 and shape not in (None, tuple(tokens.shape)):
            raise ReapError(
                f"counting was given {list(tokens.shape)}, and the model is called with tokens "
                f"{list(shape or ())}: give it one value per token of the call"
            )

    def update(
        self,
        layer_name: str,
        top_k_index: Tensor,  # [T,K] int64
        top_k_weights: Tensor,  # [T,K] float
        norms: Tensor,  # [T,K] fp32
        peaks: Tensor,  # [T,K] fp32
        mask: Tensor | None = None,  # [T] bool
        *,
        output_sums: Tensor | None = None,  # [2,E,H], with `outputs`
        channel_sums: Tensor | None = None,  # [2,E,I]
        logits: Tensor | None = None,  # [T,E], with `logits`
    ) -> None:
        """Add T tokens of one layer to the current domain; see `LayerStatistics.update`.

        Also ReapError for an unknown layer, or more slots per token than the layer's top_k.
        """
        info = self._info(layer_name)
        if top_k_index.dim() == 2 and top_k_index.shape[1] > info.top_k:
            raise ReapError(
                f"layer {layer_name}: {top_k_index.shape[1]} slots per token, but the model's "
                f"top_k is {info.top_k}"
            )
        key = (self._domain, layer_name)
        if key not in self._parts:
            self._parts[key] = self._empty(info, norms.device)
        self._updated.add(layer_name)
        mask = self.counted_of(len(top_k_index), norms.device, mask)
        self._parts[key].update(
            *(top_k_index, top_k_weights, norms, peaks, mask),
            output_sums=output_sums,
            channel_sums=channel_sums,
            logits=logits,
        )

    def slot_weights(
        self,
        layer_name: str,
        top_k_index: Tensor,  # [T,K]
        top_k_weights: Tensor,  # [T,K]
        mask: Tensor | None = None,  # [T] bool
    ) -> Tensor | None:
        """What the slots of a call weigh in the sums that `update` wants with `outputs`, [2,T,K]
        fp32: 1 and the gate where a slot counts, 0 elsewhere. None without `outputs`."""
        if not self.outputs:
            return None
        counted = top_k_index < self._info(layer_name).num_experts
        mask = self.counted_of(len(top_k_index), top_k_index.device, mask)
        if mask is not None:
            counted &= mask.to(counted.device)[:, None]
        gate = read_gates(top_k_weights.double(), self.gates)
        return torch.stack([counted.float(), torch.where(counted, gate, 0.0).float()])

    def updated(self) -> set[str]:
        """The layers that were updated since this was called before."""
        found, self._updated = self._updated, set()
        return found

    def counted_of(self, tokens: int, device: torch.device, mask: Tensor | None) -> Tensor | None:
        """[T] bool: the tokens of `mask` that `counting` lets count; None: all. ReapError when that
        was given another number of them."""
        if self._counted is None:
            return mask
        if self._counted.numel() != tokens:
            raise ReapError(
                f"counting was given {self._counted.numel()} values, and a layer was called with "
                f"{tokens} tokens: give it one value per token of the call"
            )
        if device not in self._placed:
            self._placed[device] = (self._counted != 0).flatten().to(device)
        counted = self._placed[device]
        return counted if mask is None else counted & mask.to(device)

    def layer(self, name: str, domain: str | None = None) -> LayerStatistics:
        """One layer's statistics in `domain`, or summed over all domains. ReapError if unknown."""
        info = self._info(name)
        if domain is not None:
            self._check_domain(domain)
        total = self._empty(info)
        for (its_domain, its_name), part in self._parts.items():
            if its_name == name and domain in (None, its_domain):
                total = total + part
        return total

    def __getitem__(self, name: str) -> LayerStatistics:
        return self.layer(name)

    def parts(self, name: str) -> Iterator[LayerStatistics]:
        """One layer's statistics in every domain that has it, not copied: only to be read."""
        return (part for (_, its_name), part in self._parts.items() if its_name == name)

    def select(self, *domains: str) -> Statistics:
        """Only the statistics of `domains`. ReapError for one that was not observed."""
        for domain in domains:
            self._check_domain(domain)
        chosen = self._like(self.model)
        chosen._parts = {key: part for key, part in self._copies() if key[0] in domains}
        return chosen

    def snapshot(self, domain: str) -> Statistics:
        """A copy of one domain as it is now, on its devices; waits for none of them."""
        chosen = self._like(self.model)
        with torch.inference_mode(False):  # later sums are not made in one
            chosen._parts = {
                key: copy.deepcopy(part) for key, part in self._parts.items() if key[0] == domain
            }
        return chosen

    def check(self) -> None:
        """ReapError naming layer and expert if a slot so far could not be summed (NaN, Inf). Waits
        for each device once."""
        by_device: dict[torch.device, list[LayerStatistics]] = {}
        for part in self._parts.values():
            by_device.setdefault(part.device, []).append(part)
        for parts in by_device.values():
            if any_faults(parts):
                for part in parts:
                    part.check()

    def __add__(self, other: object) -> Statistics:
        """Both together, for shards, domains and ranks; see `total`."""
        if not isinstance(other, Statistics):
            return NotImplemented
        return Statistics.total((self, other))

    @classmethod
    def total(cls, many: Iterable[Statistics]) -> Statistics:
        """The sum of all, of which one at a time is held. ReapError says how two do not belong
        together; also for none at all, and for one shard of a run twice.

        Unknown weights match known ones; the sum then carries the known ones, so that two different
        models never meet through a third.
        """
        rest = iter(many)
        first = next(rest, None)
        if first is None:
            raise ReapError("no statistics to add: give at least one")
        total = first._like(first.model)
        total._parts.update(first._copies())
        data = list(first.data)
        for more in rest:
            total._take(more)
            data += more.data
        total.data = joined(data)
        return total

    def _take(self, other: Statistics) -> None:
        """Add `other`, but for its data, to statistics that nobody else has."""
        differences = [self.model.difference(other.model)]
        for field in ("gates", *KINDS):
            mine, theirs = getattr(self, field), getattr(other, field)
            differences.append(f"{field} {mine} against {theirs}" if mine != theirs else None)
        for difference in filter(None, differences):
            raise ReapError(
                f"cannot combine statistics of {self.model.name} and {other.model.name}: "
                f"{difference}"
            )
        known, rest = sorted((self.model, other.model), key=_provenance)
        names = self.layers, other.layers
        self.model = replace(known, structure=known.structure or rest.structure)
        self._infos = {layer.name: layer for layer in self.model.layers}
        self.versions = _join_versions(self.versions, other.versions)
        # Of two releases of transformers they may be under another module.
        mine, theirs = (dict(zip(each, self.layers, strict=True)) for each in names)
        parts = {(domain, mine[name]): part for (domain, name), part in self._parts.items()}
        self._parts = {key: part.called(key[1]) for key, part in parts.items()}
        for (domain, name), part in other._parts.items():
            key = domain, theirs[name]
            if key not in self._parts:
                self._parts[key] = self._empty(self._infos[key[1]])
            self._parts[key].merge(part.called(key[1]))

    def __radd__(self, other: object) -> Statistics:
        """So that `sum([a, b])` works, which begins with 0."""
        if type(other) is int and other == 0:
            return self._like(self.model) + self
        return NotImplemented

    def __repr__(self) -> str:
        domains = ", ".join(self.domains) or "none"
        return (
            f"<Statistics of {self.model.name}: {counted(self.tokens, 'token')} through "
            f"{counted(len(self), 'MoE layer')}, domains {domains}>"
        )

    def __iter__(self) -> Iterator[str]:
        """The names of the layers, as of a mapping."""
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __eq__(self, other: object) -> bool:
        """Whether model, gates and every exact sum are the same (not `data` and `versions`)."""
        if not isinstance(other, Statistics):
            return NotImplemented
        return self.model == other.model and self.same_sums(other)

    __hash__ = None  # type: ignore[assignment]

    def same_sums(self, other: Statistics) -> bool:
        """Whether gates and every exact sum are the same, layer by layer, whatever the layers are
        called and whatever is known of the models."""
        alike = all(getattr(self, field) == getattr(other, field) for field in ("gates", *KINDS))
        if not alike or len(self) != len(other):
            return False
        mine = dict(zip(other.layers, self.layers, strict=True))
        theirs = other._parts.items()
        return self._parts == {(d, mine[name]): its.called(mine[name]) for (d, name), its in theirs}

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Write one safetensors file, whole or not at all. ReapError if it exists or cannot be
        written.

        `reap.statistics.statsfile` describes the format.
        """
        statsfile.write(self._state(), path, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Statistics:
        """Read what `save` wrote. ReapError for anything else, or for damage that can be seen."""
        state = statsfile.read(path)
        stats = cls(
            state.model,
            gates=state.gates,
            **state.kinds,
            data=state.data,
            versions=state.versions,
        )
        stats._parts.update(state.parts)
        return stats

    @classmethod
    def of(cls, given: Statistics | str | PathLike[str]) -> Statistics:
        """Statistics as they are, or those in a file. ReapError for anything else."""
        if isinstance(given, cls):
            return given
        if isinstance(given, str | PathLike):
            return cls.load(given)
        raise ReapError(
            f"stats is a {type(given).__name__}: it must be Statistics, or the file of some"
        )

    def digest(self) -> str:
        """Hex SHA-256 of model, gates and every exact sum: equal statistics, equal digests."""
        return statsfile.digest(self._state())

    def _state(self) -> statsfile.State:
        return statsfile.State(
            self.model,
            self.gates,
            self.kinds,
            self.data,
            self.versions,
            self._parts,
        )

    def _most_tokens(self, domains: tuple[str, ...]) -> int:
        seen = Counter[str]()
        for (domain, name), part in self._parts.items():
            seen[name] += part.tokens if domain in domains else 0
        return max(seen.values(), default=0)

    def _like(self, model: ModelInfo) -> Statistics:
        return Statistics(
            model,
            gates=self.gates,
            **self.kinds,
            data=self.data,
            versions=self.versions,
        )

    def _empty(self, info: LayerInfo, device: torch.device | str = "cpu") -> LayerStatistics:
        return LayerStatistics(
            info.num_experts,
            name=info.name,
            gates=self.gates,
            **self.kinds,
            device=device,
        )

    def _copies(self) -> Iterator[tuple[tuple[str, str], LayerStatistics]]:
        # A sum with nothing is a copy: later updates of one must not show in the other.
        for key, part in self._parts.items():
            yield key, part + self._empty(self._infos[key[1]])

    def _info(self, name: str) -> LayerInfo:
        if name not in self._infos:
            raise ReapError(f"model {self.model.name} has no MoE layer called {name!r}")
        return self._infos[name]

    def _check_domain(self, domain: str) -> None:
        if domain not in self.domains:
            known = ", ".join(self.domains) or "none"
            raise ReapError(f"no domain {domain!r} was observed: there is {known}")


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide what is computed."""
    found = versions.installed("reap-saliency", "torch", "transformers")
    return {package: number or "unknown" for package, number in found.items()}


def _provenance(model: ModelInfo) -> tuple[Any, ...]:
    """A sort key that does not depend on the order of a sum: what knows most comes first."""
    structure = model.structure.to_json() if model.structure else {}
    known = model.weights is None, model.weights or "", not structure, not structure.get("config")
    return (
        *known,
        model.name,
        [layer.name for layer in model.layers],
        json.dumps(structure, sort_keys=True),
        model.transformers or "",
    )


def _join_versions(mine: dict[str, str], theirs: dict[str, str]) -> dict[str, str]:
    joined = {}
    for package in sorted({*mine, *theirs}):
        seen = {*mine.get(package, "").split(", "), *theirs.get(package, "").split(", ")}
        joined[package] = ", ".join(sorted(seen - {""}))
    return joined
