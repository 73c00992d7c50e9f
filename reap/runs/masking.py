"""A plan as a mask: the model runs as if the experts that it drops were gone.

    with reap.masked(model, plan):
        model(**batch)  # the logits of the pruned checkpoint

Nothing is written and no expert's weight is moved, so that many plans can be tried on one model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import nn

from reap.errors import ReapError
from reap.model import compat
from reap.model.config import NeedsCodeError
from reap.model.experts import find_experts, pretrained
from reap.model.identity import describe, describe_folder
from reap.model.info import ModelInfo
from reap.model.mtp import MTP
from reap.model.mtplayer import Mtp
from reap.observation.rerouting import Rerouting
from reap.planning.plan import Plan


@contextmanager
def masked(
    model: nn.Module, plan: Plan | str | os.PathLike[str], *, mtp: Mtp | None = None
) -> Iterator[None]:
    """Inside the `with`, `model` computes what the checkpoint that `plan` makes of it computes.

        with reap.masked(model, plan):
            model.generate(**inputs)

    Every router runs its own code on its tensors (weights, biases, correction biases, group counts,
    tables of tokens) cut to the experts kept, as in the pruned checkpoint, so choices and gates are
    the same bits; outputs are equal up to the rounding of the experts' kernels. Router logits that
    the base model returns are those of the experts kept; a model with a head, which would add an
    auxiliary loss of them, returns none. `plan` may be the file of one. `mtp`: the model's
    multi-token-prediction layer, which is masked too if the plan speaks of it.

    This is inference: routers carry no gradient inside. It works around and inside of `observe`
    (whose statistics have all experts, the dropped ones with no token), `calibrate` and `generate`,
    with as many threads as the model. A compiled model runs uncompiled inside. The model is put
    back exactly, also after an exception.

    ReapError, before anything runs: a plan of another model (another top-k included), a model that
    is masked already, a router that is not known, is quantised, offloaded or split over processes.
    """
    with mask_of(model, plan, mtp=mtp).entered():
        yield


def mask_of(
    model: nn.Module, plan: Plan | str | os.PathLike[str], *, mtp: Mtp | None = None
) -> Rerouting:
    """What `masked` enters: checked once, entered as often as one likes."""
    compat.require(compat.OBSERVING)
    plan = loaded(plan)
    found = find_experts(model)
    if mtp is not None and len(plan.model.layers) > len({one.name for one in found}):
        found = [*found, *mtp.experts]
    else:
        mtp = None
    here = describe(model, found[: len(found) - len(mtp.experts if mtp else ())], mtp)
    wanted = _spoken_of(plan.model, here)
    different = wanted.difference(here, to_prune=True)
    if different and not _in_folder(compat.source(pretrained(model).config), wanted, here):
        raise ReapError(f"the plan was made for another model than {here.name}: {different}")
    # By place: releases of transformers may call the layers otherwise.
    pairs = list(zip(here.layers, wanted.layers, strict=True))
    kept = {ours.name: plan.kept[theirs.name] for ours, theirs in pairs}
    counts = {layer.name: layer.num_experts for layer in here.layers}
    return Rerouting(model, found, kept, counts, here.model_type)


def _spoken_of(wanted: ModelInfo, here: ModelInfo) -> ModelInfo:
    """What a plan was made for, without the multi-token-prediction layer that is not run here."""
    extra = wanted.layers[len(here.layers) :]
    depth = wanted.structure.modules.get("layers") if wanted.structure else None
    for layer in extra:
        parts = layer.name.split(".")
        number = next((int(part) for part in parts if part.isdigit()), -1)
        if number != depth and not any(map(MTP.match, parts)):
            return wanted
    return replace(wanted, layers=wanted.layers[: len(here.layers)])


def _in_folder(source: str, wanted: ModelInfo, here: ModelInfo) -> bool:
    """Whether what a plan was made for is the same folder's model, loaded in another way: a
    composite model whole, or its language model alone."""
    if not os.path.isdir(source):
        return False
    try:
        found = describe_folder(source, like=wanted)
    except ReapError:
        return False
    sizes = [[replace(layer, name="") for layer in info.layers] for info in (wanted, here)]
    return sizes[0] == sizes[1] and wanted.difference(found, to_prune=True) is None


def loaded(plan: Plan | str | os.PathLike[str]) -> Plan:
    """A plan, or what the file of one holds."""
    return plan if isinstance(plan, Plan) else Plan.load(plan)


def check_plan_of(folder: Path, plan: Plan) -> None:
    """ReapError when the model in `folder` is not the plan's, as far as its files tell: before it
    is loaded."""
    try:
        found = describe_folder(folder, like=plan.model)
    except NeedsCodeError:
        return  # what is loaded will be compared
    different = plan.model.difference(found, to_prune=True)
    if different:
        raise ReapError(f"the plan was made for another model than {folder}: {different}")
