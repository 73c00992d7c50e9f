"""Whether a disk has room for what a run will write."""

from __future__ import annotations

import shutil
from pathlib import Path

from reap.errors import ReapError
from reap.files.units import sized
from reap.model.info import ModelInfo
from reap.statistics.exact import LIMBS
from reap.statistics.layerstats import SUMS
from reap.statistics.logitsums import cells
from reap.statistics.setcounts import set_size

PER_EXPERT = 8 + 4 + len(SUMS) * LIMBS * 4  # bytes of a file: count, peak and sums
PER_PAIR = 8 + LIMBS * 4
PER_COLUMN = 32  # of an expert's sums of vectors
PER_LAYER_OF_SETS, PER_CELL = 16, 16  # of coalitions; of logits
HIDDEN, INNER = ("hidden_size",), ("moe_intermediate_size", "intermediate_size")


def statistics_size(
    model: ModelInfo,
    pairs: bool,
    domains: int,
    outputs: bool = False,
    coalitions: int = 0,
    logits: bool = False,
) -> int:
    """Bytes of a file of statistics of `model`, without its header; of outputs, as far as its
    configuration names their sizes, of coalitions the most that there may be."""
    size, columns = 0, _columns(model) if outputs else 0
    for layer in model.layers:
        E = layer.num_experts
        size += 8 + E * PER_EXPERT + (E * (E - 1) // 2 * PER_PAIR if pairs else 0)
        size += E * columns * PER_COLUMN
        size += coalitions * set_size(layer.top_k) + (coalitions > 0) * PER_LAYER_OF_SETS
        size += cells(E) * PER_CELL if logits else 0
    return size * domains


def _columns(model: ModelInfo) -> int:
    """Hidden and inner size of an expert, 0 for what the configuration does not name."""
    config = {} if model.structure is None else model.structure.config
    columns = 0
    for names in (HIDDEN, INNER):
        found = (
            value
            for name in names
            for field, value in config.items()
            if field.rpartition(".")[2] == name and type(value) is int
        )
        columns += next(found, 0)
    return columns


def check_disk(out: Path, size: int, what: str = "statistics") -> None:
    """ReapError when the disk of `out` has no room for a file of `size` bytes, with the one of a
    run that goes on, which is written anew beside its older self."""
    free = shutil.disk_usage(next(place for place in out.absolute().parents if place.is_dir())).free
    if 2 * size > free:
        raise ReapError(
            f"{sized(size)} of {what}, and as much while the run goes on, have no room where "
            f"{out} is to be: {sized(free)} are free"
        )
