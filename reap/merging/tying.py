"""A merge in memory: while it lasts, the experts of a group all compute the merged expert."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from reap.errors import ReapError
from reap.merging.averaging import WIDE, average
from reap.merging.mergeplan import Group, Merge
from reap.model import compat
from reap.model.experts import Experts, find_experts
from reap.model.identity import describe

Rows = Sequence[Tensor]  # one quantity of every expert of a layer, written to in place


@contextmanager
def merged(model: nn.Module, merge: Merge | str | PathLike[str]) -> Iterator[None]:
    """`model` with its experts merged, inside the `with`; afterwards exactly as it was.

        with reap.merged(model, merge):
            model(**batch)

    Every expert of a group holds the merged weights, and the router still has an output for each:
    where a token chose several of them their gates add up. The checkpoint that `reap.merge` writes
    computes the same. The weights that change are kept aside meanwhile, which takes their size in
    memory again. Weights are changed in place: no other thread may use the model.

    ReapError, before anything changes, for a merge of another model, for weights that are quantised
    or not in memory, and for experts of a group that differ in shape.
    """
    merge = Merge.of(merge)
    compat.require(compat.OBSERVING)
    found = find_experts(model)
    if compat.is_quantised(model):
        raise ReapError(
            f"{type(model).__name__} has quantised weights, which have no mean: load it "
            "dequantised to merge its experts"
        )
    work = [
        (rows, group)
        for experts, groups in _matched(model, merge, found)
        for rows in _whole(experts, sum(len(group.experts) for group in groups))
        for group in groups
        if len(group.experts) > 1
    ]
    with tied(work):
        yield


@contextmanager
def tied(work: Iterable[tuple[Rows, Group]]) -> Iterator[None]:
    """Inside, the rows of each group hold their mean; afterwards what they held before."""
    aside: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for rows, group in work:
                mean = average((rows[i] for i in group.experts), group.shares)
                for i in group.experts:
                    aside.append((rows[i], rows[i].clone()))
                    rows[i].copy_(mean)
        yield
    finally:
        with torch.no_grad():
            for row, before in reversed(aside):
                row.copy_(before)


def _matched(
    model: nn.Module, merge: Merge, found: list[Experts]
) -> list[tuple[Experts, tuple[Group, ...]]]:
    """The experts and their groups, those with the same weights once. A merge may also speak of a
    multi-token-prediction layer, which a model in memory is without."""
    here = describe(model, found)
    names = {layer.name for layer in here.layers}
    common = tuple(layer for layer in merge.model.layers if layer.name in names)
    mine = replace(merge.model, layers=common) if len(common) == len(names) else merge.model
    different = mine.difference(here, to_prune=True)
    if different:
        raise ReapError(f"the merge was made for another model than {here.name}: {different}")
    called = {b.name: a.name for a, b in zip(mine.layers, here.layers, strict=True)}
    once = {id(next(iter(e.module.parameters()), e.module)): e for e in reversed(found)}
    return [(experts, merge.groups[called[experts.name]]) for experts in once.values()]


def _whole(experts: Experts, count: int) -> list[Rows]:
    """`rows_of` them; ReapError where not all of the `count` experts are here."""
    found = rows_of(experts)
    if compat.is_split(experts.module) or any(len(rows) != count for rows in found):
        raise ReapError(
            f"{type(experts.module).__name__} ({experts.name}) does not hold all of its {count} "
            "experts: load the model without tensor or expert parallelism"
        )
    return found


def rows_of(experts: Experts) -> list[Rows]:
    """What the experts of a layer hold, a quantity at a time. ReapError for what has no mean."""
    where = f"{type(experts.module).__name__} ({experts.name})"
    named = (
        _listed(experts.module, where)
        if experts.kind == "list"
        else _stacked(experts.module, where)
    )
    for name, rows in named.items():
        first = rows[0]
        for i, row in enumerate(rows):
            if row.shape != first.shape or row.dtype != first.dtype:
                raise ReapError(
                    f"{where}: {name} of expert {i} is {row.dtype} {list(row.shape)}, of expert 0 "
                    f"{first.dtype} {list(first.shape)}: experts that differ cannot be merged"
                )
        if first.is_meta:
            raise ReapError(
                f"{where}: {name} is on the meta device: load the model's weights into memory"
            )
        if first.dtype not in WIDE:
            raise ReapError(
                f"{where}: {name} is of {first.dtype}: quantised weights have no mean, load the "
                "model dequantised to merge its experts"
            )
    return list(named.values())


def _stacked(module: nn.Module, where: str) -> dict[str, Rows]:
    """Of a module with parameters [E, ...]; what its children hold, all experts share."""
    own = dict(module.named_parameters(recurse=False))
    count = next((p.shape[0] for p in own.values() if p.dim() > 1), 0)
    for name, parameter in own.items():
        if parameter.dim() < 2 or parameter.shape[0] != count:
            raise ReapError(
                f"{where} cannot be merged: {name} {list(parameter.shape)} is not one entry for "
                "each expert"
            )
    if not own:
        raise ReapError(f"{where} cannot be merged: it holds no weights of its own")
    return {name: parameter.data for name, parameter in own.items()}


def _listed(module: nn.Module, where: str) -> dict[str, Rows]:
    """Of a ModuleList, an expert each."""
    each: list[dict[str, Tensor]] = [_state(expert) for expert in module.children()]
    for i, state in enumerate(each):
        odd = sorted(set(state) ^ set(each[0]))
        if odd:
            raise ReapError(
                f"{where}: expert {i} and expert 0 differ in {odd[0]}: experts that differ cannot "
                "be merged"
            )
    return {name: [state[name] for state in each] for name in each[0]}


def _state(expert: Any) -> dict[str, Tensor]:
    tensors = (*expert.named_parameters(), *expert.named_buffers())
    return {name: tensor.data for name, tensor in tensors}
