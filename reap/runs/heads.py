"""Which multi-token-prediction layer a run observes, and what is said of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn

from reap.model import compat
from reap.model.config import text_config
from reap.model.experts import pretrained
from reap.model.identity import mtp_of
from reap.model.load import load_mtp
from reap.model.mtp import FAMILIES, UnsupportedMtpError
from reap.model.mtplayer import Mtp

log = logging.getLogger("reap")

KNOWN = {name for family in FAMILIES for name in family.types}


def own_mtp(model: nn.Module) -> Mtp | None:
    """The layer in the local folder that the model came from, if there is one that can be run.

    A line in the log for one that cannot, and for one that may be on the hub.
    """
    config = pretrained(model).config
    source = compat.source(config)
    if not any(Path(source or "-").glob("*.safetensors")):
        elsewhere = source and not Path(source).is_dir()
        if elsewhere and text_config(config).model_type in KNOWN:
            log.warning(
                "multi-token prediction is left out: %s is no folder here, in which that layer "
                "could be: give mtp=reap.load_mtp(model, folder)",
                source,
            )
        return None
    try:
        return load_mtp(model)
    except UnsupportedMtpError as error:
        log.warning("multi-token prediction is left out: %s", error)
        return None


def chosen_mtp(model: Any, folder: Path, wanted: bool) -> tuple[Mtp | None, list[str]]:
    """The layer of `folder`, if it is `wanted` and can be run, and a line of what becomes of it; no
    line where the folder has none."""
    prefix, unknown = mtp_of(folder, model.config)
    if prefix is None and unknown is None:
        return None, []
    try:
        mtp = load_mtp(model, folder) if wanted else None
    except UnsupportedMtpError as error:
        mtp, unknown = None, str(error)
    if mtp is not None:
        return mtp, [f"multi-token prediction: {prefix} counted too, `reap prune` will keep it"]
    why = unknown if wanted else "--no-mtp"
    return None, [f"multi-token prediction is left out, `reap prune` will drop it: {why}"]
