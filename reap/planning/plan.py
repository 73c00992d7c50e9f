"""Which experts stay: scores -> Plan, safe by construction and frozen as JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from reap.errors import ReapError
from reap.files.atomic import write_file
from reap.files.kinds import kind_of
from reap.files.outputs import PLAN, check_file
from reap.files.paths import path_of
from reap.files.safefile import parse_json, read_json
from reap.files.units import counted
from reap.model.info import LayerInfo, ModelInfo
from reap.planning.budget import check_scope, global_counts, normalized, staying
from reap.planning.counting import (
    Ratio,
    count_fault,
    kept_counts,
    ratio_text,
    share_of,
    split_note,
)

if TYPE_CHECKING:
    from reap.statistics.stats import Statistics

FORMAT = PLAN
VERSION = 2
READS = (1, 2)  # 1 has no structure of the model
NEXT = "give the file that `reap plan` wrote"


@dataclass(frozen=True)
class Plan:
    """The experts that stay in every MoE layer of `model`.

    `kept` maps every layer's name to ascending expert ids. `options` says how the number was asked
    for, `calibration` where the scores come from; both are free-form JSON. ReapError on creation
    when the layers are not the model's, ids are not ascending and in range, or a router could no
    longer pick its top_k from what is kept.
    """

    model: ModelInfo
    criterion: str
    seed: int
    kept: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.options.get("ratio") is not None:
            share_of(self.options["ratio"])
        names = [layer.name for layer in self.model.layers]
        if set(self.kept) != set(names):
            odd = sorted(set(self.kept) ^ set(names))[0]
            where = "the model but not the plan" if odd in names else "the plan but not the model"
            raise ReapError(f"a plan must cover the model's MoE layers: {odd!r} is in {where}")
        for layer in self.model.layers:
            _check_kept(layer, self.kept[layer.name])
        kept = {name: tuple(self.kept[name]) for name in names}
        object.__setattr__(self, "kept", MappingProxyType(kept))

    def __repr__(self) -> str:
        counts = {(layer.num_experts, len(self.kept[layer.name])) for layer in self.model.layers}
        told = ", ".join(f"{kept} of {experts}" for experts, kept in sorted(counts))
        return (
            f"<Plan of {self.model.name} by {self.criterion}: keeps {told} experts in "
            f"{counted(len(self.kept), 'layer')}>"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles, which cannot have a read-only view of a mapping."""
        return _made, ({**vars(self), "kept": dict(self.kept)},)

    @property
    def dropped(self) -> Mapping[str, tuple[int, ...]]:
        """The experts that go, ascending, by layer."""
        return {layer.name: _others(layer, self.kept[layer.name]) for layer in self.model.layers}

    @property
    def uniform(self) -> bool:
        """Whether layers of equally many experts keep equally many."""
        counts = {(layer.num_experts, len(self.kept[layer.name])) for layer in self.model.layers}
        return len(counts) == len({experts for experts, _ in counts})

    @property
    def notes(self) -> tuple[str, ...]:
        """What a careful reader would say about this plan, one line each."""
        notes = []
        ratio = self.options.get("ratio")
        share = None if ratio is None else share_of(ratio)
        counts = {
            (layer.num_experts, len(self.kept[layer.name])): layer for layer in self.model.layers
        }
        wanted = self.options.get("keep")
        if self.options.get("scope") == "global":
            share = wanted = None  # of all layers together
        if not any(self.dropped.values()):
            notes.append("drops no expert: a model pruned by it would be a copy")
        for (experts, kept), layer in sorted(counts.items(), key=lambda item: item[0]):
            if share is not None and experts - kept != math.floor(experts * share):
                notes.append(
                    f"drops {experts - kept} of {experts} experts per layer, not "
                    f"{math.floor(experts * share)}: the number kept was rounded up"
                )
            if type(wanted) is int and wanted < kept:
                notes.append(
                    f"keeps {kept} of {experts} experts per layer, not {wanted}: rounded up to a "
                    f"multiple of {self.options.get('multiple_of')}"
                )
            notes.extend(filter(None, [split_note(layer, kept)]))
        if not self.uniform:
            notes.append(
                "layers that had equally many experts keep different numbers: a checkpoint pruned "
                "so is loaded by reap.load_model, others refuse it"
            )
        return (*notes, *_protection_notes(self.options))

    def to_json(self) -> str:
        """The plan as JSON text."""
        dropped = self.dropped
        layers = {
            name: {"kept": list(kept), "dropped": list(dropped[name])}
            for name, kept in self.kept.items()
        }
        about = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model.to_json(),
            "criterion": self.criterion,
            "seed": self.seed,
            "layers": layers,
            "options": dict(self.options),
            "calibration": dict(self.calibration),
        }
        return json.dumps(about, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `to_json`. ReapError for anything else."""
        data = parse_json(text.encode(errors="surrogatepass"), "the plan")
        return cls._from_object(data, "the plan")

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Write `to_json`, whole or not at all. ReapError if `path` exists or cannot be written.

        `overwrite` replaces a plan alone.
        """
        path_of(path, "path", "the file to write")
        check_file(path, FORMAT, overwrite=overwrite)
        write_file(path, self.to_json().encode(), overwrite=overwrite)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """Read what `save` wrote. ReapError for anything else."""
        path = path_of(path, "the plan", "a plan, or the file of one")
        kind = kind_of(path)
        if kind not in (None, "a plan"):
            hint = "make one of it with `reap plan`" if kind == "statistics" else NEXT
            raise ReapError(f"{path} is {kind}, not a plan: {hint}")
        return cls._from_object(read_json(path), str(path))

    @classmethod
    def _from_object(cls, data: dict[str, Any], where: str) -> Plan:
        if data.get("format") != FORMAT:
            raise ReapError(f"{where} is no plan: its format is {data.get('format')!r}")
        if data.get("version") not in READS:
            raise ReapError(
                f"{where} has version {data.get('version')!r}: this program reads up to version "
                f"{VERSION}"
            )
        kinds = {"criterion": str, "seed": int, "layers": dict}
        for name, kind in {**kinds, "options": dict, "calibration": dict}.items():
            if type(data.get(name)) is not kind:
                raise ReapError(f"{where}: field {name!r} must be a JSON {kind.__name__}")
        kept = {}
        for name, entry in data["layers"].items():
            if not isinstance(entry, dict) or set(entry) != {"kept", "dropped"}:
                raise ReapError(f"{where}: layer {name!r} must have exactly kept and dropped")
            if not isinstance(entry["kept"], list):
                raise ReapError(f"{where}: layer {name!r}: kept must be a list of expert ids")
            kept[name] = tuple(entry["kept"])
        try:
            made_with = data["calibration"].get("versions")
            release = made_with.get("transformers") if isinstance(made_with, dict) else None
            plan = cls(
                model=ModelInfo.from_json(data.get("model"), transformers=release),
                criterion=data["criterion"],
                seed=data["seed"],
                kept=kept,
                options=data["options"],
                calibration=data["calibration"],
            )
        except ReapError as error:
            raise ReapError(f"{where}: {error}") from error
        for layer in plan.model.layers:
            kept_ids, dropped = plan.kept[layer.name], data["layers"][layer.name]["dropped"]
            # Lengths first: a short file must not make a long list.
            lengths_fit = isinstance(dropped, list) and (
                len(kept_ids) + len(dropped) == layer.num_experts
            )
            if not lengths_fit or dropped != list(_others(layer, kept_ids)):
                raise ReapError(f"{where}: layer {layer.name!r}: dropped is not the rest of kept")
        return plan


def _made(fields: dict[str, Any]) -> Plan:
    return Plan(**fields)


def make_plan(
    stats: Statistics | str | PathLike[str],
    criterion: str = "reap",
    *,
    ratio: Ratio | None = None,
    keep: int | None = None,
    multiple_of: int = 1,
    protect_super_experts: bool = False,
    seed: int = 0,
    scope: str = "layer",
    normalize: str | None = None,
    total: int | None = None,
    min_per_layer: int | None = None,
) -> Plan:
    """Keep the experts with the highest scores in every layer; of equals the lower id stays.

    Exactly one of `ratio` (floor(E * ratio) experts go, in decimal: 100 * 0.29 is 29) and `keep`
    (experts per layer) says how many. The number kept is rounded up to a multiple of `multiple_of`;
    with `ratio` also to a multiple of the router's groups, which all lose the same number. Super
    experts (`saliency.super_experts`) stay when protected.

    With scope="global" layers keep different numbers, out of one budget: `ratio` is of all experts,
    `keep` an average per layer, `total` the number of all, and every layer keeps at least
    `min_per_layer` and what its router picks. `normalize` makes scores of layers comparable: "raw",
    "mean" (unless said otherwise) or "share" (`reap.planning.budget`). A checkpoint pruned so is
    loaded by `reap.load_model`, and by few servers.

    ReapError, naming the nearest ratio that works, when a layer's router could not pick its top_k,
    the rounding exceeds E, groups do not divide `keep`, or more experts are protected than kept.
    """
    from reap.planning.criteria import rank, saliency, super_experts
    from reap.statistics.stats import Statistics

    stats = Statistics.of(stats)
    if type(seed) is not int:
        raise ReapError(f"seed is {seed!r}: it must be a whole number")
    layers = stats.model.layers
    size: dict[str, Any] = {"ratio": ratio, "keep": keep, "multiple_of": multiple_of}
    across: dict[str, Any] = {"total": total, "min_per_layer": min_per_layer}
    check_scope(scope, normalize, **across)
    counts = None if scope == "global" else kept_counts(layers, **size)
    protected = super_experts(stats) if protect_super_experts else {}
    scores = saliency(stats, criterion, seed=seed)
    ranked = {}
    for layer in layers:
        try:
            ranked[layer.name] = rank(scores[layer.name])
        except ReapError as error:
            raise ReapError(f"layer {layer.name}: {error}") from error
    if counts is None:
        rule = normalize or "mean"
        comparable, ordered = normalized(scores, rule), {}
        for layer in layers:
            order = staying(layer, ranked[layer.name], protected.get(layer.name, ()))
            ordered[layer.name] = comparable[layer.name][order].tolist()
        counts = global_counts(
            layers, ordered, **size, total=total, least=min_per_layer, protected=protected
        )
        across |= {"scope": scope, "normalize": rule}
    kept = {
        layer.name: select(layer, ranked[layer.name], count, protected.get(layer.name, ()))
        for layer, count in zip(layers, counts, strict=True)
    }
    return Plan(
        model=stats.model,
        criterion=criterion,
        seed=seed,
        kept=kept,
        options={
            "ratio": None if ratio is None else str(ratio),
            "keep": keep,
            "multiple_of": multiple_of,
            **{name: value for name, value in across.items() if value is not None},
            "protect_super_experts": protect_super_experts,
            "protected": {name: list(experts) for name, experts in protected.items()},
        },
        calibration=stats.origin(),
    )


def trial_plan(
    model: ModelInfo,
    *,
    ratio: Ratio | None = None,
    keep: int | None = None,
    multiple_of: int = 1,
    scope: str = "layer",
    normalize: str | None = None,
    total: int | None = None,
    min_per_layer: int | None = None,
) -> Plan:
    """A plan of the size that `make_plan` would give, by which the last experts stay, so that all
    are renumbered, and with the scope "global" layers keep numbers as different as they may be:
    what can be checked of a pruning before there are statistics. ReapError as of `make_plan`, and
    where it drops nothing."""
    size: dict[str, Any] = {"ratio": ratio, "keep": keep, "multiple_of": multiple_of}
    check_scope(scope, normalize, total=total, min_per_layer=min_per_layer)
    if scope == "global":
        alike = {layer.name: [1.0] * layer.num_experts for layer in model.layers}
        counts = global_counts(model.layers, alike, **size, total=total, least=min_per_layer)
    else:
        counts = kept_counts(model.layers, **size)
    if counts == [layer.num_experts for layer in model.layers]:
        raise ReapError("no expert would be dropped: ask for a larger ratio or keep fewer")
    kept = {
        layer.name: select(layer, list(range(layer.num_experts))[::-1], count, ())
        for layer, count in zip(model.layers, counts, strict=True)
    }
    return Plan(model, "none", 0, kept)


def select(
    layer: LayerInfo, ranked: list[int], count: int, protected: Iterable[int]
) -> tuple[int, ...]:
    """The protected experts, then the best, equally many from each router group. Ascending."""
    size = layer.num_experts // layer.n_group
    per_group = count // layer.n_group
    stays = set(protected)
    order = [e for e in ranked if e in stays] + [e for e in ranked if e not in stays]
    kept: list[int] = []
    for group in range(layer.n_group):
        members = [expert for expert in order if expert // size == group]
        needed = sum(expert in stays for expert in members)
        if needed > per_group:
            least = needed * layer.n_group
            share = ratio_text(layer.num_experts - least, layer.num_experts)
            more = f"keep at least {least}, a ratio of {share}, or " if needed < size else ""
            raise ReapError(
                f"layer {layer.name}: protects {counted(needed, 'super expert')} and keeps "
                f"{counted(per_group, 'expert')}: {more}protect none"
            )
        kept.extend(members[:per_group])
    return tuple(sorted(kept))


def _others(layer: LayerInfo, kept: Iterable[int]) -> tuple[int, ...]:
    stays = set(kept)
    return tuple(expert for expert in range(layer.num_experts) if expert not in stays)


def _check_kept(layer: LayerInfo, kept: Iterable[int]) -> None:
    ids = list(kept)
    for expert in ids:
        if type(expert) is not int or not 0 <= expert < layer.num_experts:
            raise ReapError(
                f"layer {layer.name}: kept expert {expert!r} must be an id from 0 to "
                f"{layer.num_experts - 1}"
            )
    if any(a >= b for a, b in zip(ids, ids[1:], strict=False)):
        raise ReapError(f"layer {layer.name}: kept experts must ascend without repeats")
    fault = count_fault(layer, len(ids))
    if fault:
        raise ReapError(f"layer {layer.name}: cannot keep {len(ids)} experts: {fault}")
    size = layer.num_experts // layer.n_group
    held = Counter(expert // size for expert in ids)
    for group in range(layer.n_group):
        if held[group] * layer.n_group != len(ids):
            raise ReapError(
                f"layer {layer.name}: router group {group} keeps {held[group]} experts: "
                f"all {layer.n_group} groups must keep {len(ids) // layer.n_group}"
            )


def _protection_notes(options: Mapping[str, Any]) -> list[str]:
    """Which experts stay whatever their scores are."""
    if options.get("protect_super_experts") is not True:
        return []
    protected = options.get("protected")
    found = protected if isinstance(protected, dict) else {}
    named = [
        f"{layer}: {', '.join(map(str, experts))}"
        for layer, experts in found.items()
        if isinstance(experts, list) and experts
    ]
    return [f"protected super experts: {'; '.join(named)}" if named else "found no super experts"]
