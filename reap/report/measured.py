"""What plans cost, as `reap evaluate --json` printed it, {domain: measures} of one model or {plan:
{domain: measures}}, or as `reap evaluate --card` recorded it in a pruned folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reap.errors import ReapError
from reap.files.kinds import kind_of
from reap.files.outputs import KINDS, RECORD, RECORDS
from reap.files.paths import path_of
from reap.files.safefile import read_json
from reap.report.texts import whole
from reap.report.wording import distinct, plain

NEXT = "give what `reap evaluate --json` printed, or a folder that has it by --card"
MEASURES = ("loss", "perplexity", "kl", "agreement", "teacher_loss")


@dataclass(frozen=True)
class Cost:
    """One plan on one domain's text; NaN for what was not measured."""

    plan: str
    domain: str
    tokens: int
    loss: float
    perplexity: float
    kl: float
    agreement: float
    teacher_loss: float

    @property
    def increase(self) -> float:
        """Of the loss over the teacher's, nats per token."""
        return self.loss - self.teacher_loss


def read_costs(path: str | PathLike[str]) -> list[Cost]:
    """Also of a pruned or merged folder, or its record. ReapError for anything else, and for a
    folder without an evaluation."""
    path = path_of(path, "evaluation", "a file that `reap evaluate --json` wrote")
    record = path / RECORD if path.is_dir() else path
    kind = kind_of(record)
    if kind in map(KINDS.get, RECORDS):
        evaluation = read_json(record).get("evaluation")
        if not isinstance(evaluation, dict) or not isinstance(evaluation.get("results"), dict):
            raise ReapError(f"{path} records no evaluation: `reap evaluate --card` writes one")
        return costs_of(evaluation["results"], str(path), record.resolve().parent.name)
    kind = kind_of(path)
    if kind is not None:
        raise ReapError(f"{path} is {kind}, not an evaluation: {NEXT}")
    return costs_of(read_json(path), str(path), path.stem)


def costs_of(found: Mapping[str, Any], where: str = "evaluation", name: str = "") -> list[Cost]:
    """Of the document itself; `name` is that of the one model in it, if there is no plan's."""
    if set(found) == {"error"}:
        raise ReapError(f"{where} is of an evaluation that failed: {plain(found['error'])}")
    if not found:
        raise ReapError(f"{where} evaluates nothing: {NEXT}")
    plans = {name or Path(where).stem: found} if all(map(_measured, found.values())) else found
    each = (domains for domains in plans.values() if isinstance(domains, dict))
    names = list(dict.fromkeys(domain for domains in each for domain in domains))
    shown = dict(zip(names, distinct(names), strict=True))
    costs = []
    for plan, (given, domains) in zip(distinct(plans), plans.items(), strict=True):
        if not isinstance(domains, dict) or not domains:
            raise ReapError(f"{where} is no evaluation: {plain(given)!r} has no domains; {NEXT}")
        for domain, measures in domains.items():
            if not _measured(measures):
                raise ReapError(
                    f"{where} is no evaluation: {plain(domain)!r} of {plain(given)!r} lacks tokens "
                    f"and loss; {NEXT}"
                )
            values = {measure: _number(measures.get(measure)) for measure in MEASURES}
            costs.append(Cost(plan, shown[domain], measures["tokens"], **values))
    return costs


def tables(costs: list[Cost]) -> tuple[list[str], list[str], dict[str, Tensor]]:
    """Plans, domains, and what was measured of all -> [plans, domains] fp64, NaN where it was not:
    the increase of the loss where there was a teacher, else the loss; then the divergence."""
    plans = list(dict.fromkeys(cost.plan for cost in costs))
    domains = list(dict.fromkeys(cost.domain for cost in costs))
    increases = any(not math.isnan(cost.increase) for cost in costs)
    kinds = {
        "increase of loss, nats per token" if increases else "loss, nats per token": (
            "increase" if increases else "loss"
        ),
        "KL divergence from the original, nats per token": "kl",
    }
    found = {}
    for what, field in kinds.items():
        table = torch.full((len(plans), len(domains)), math.nan, dtype=torch.float64)
        for cost in costs:
            table[plans.index(cost.plan), domains.index(cost.domain)] = getattr(cost, field)
        if not table.isnan().all():
            found[what] = table
    return plans, domains, found


def _measured(value: Any) -> bool:
    return isinstance(value, dict) and whole(value.get("tokens")) is not None and "loss" in value


def _number(value: Any) -> float:
    try:
        return float(value) if type(value) in (int, float) else math.nan
    except OverflowError:  # of an integer
        return math.nan
