"""Calibration of a model in a folder, layer by layer and in waves: as many batches at a time as
memory holds. After a wave its statistics are kept, and a run that ends early goes on from there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from reap.model.experts import pretrained
from reap.model.layerwise import Layerwise
from reap.observation.patch import observe
from reap.runs.calibration import completed, forward_of, what_runs
from reap.runs.partial import Partial
from reap.runs.streaming import Stream
from reap.statistics.stats import Statistics
from reap.text.batching import Batch, Batches


def calibrate_streamed(
    folder: str | PathLike[str],
    batches: Iterable[Batch | Mapping[str, Any]],
    *,
    gates: str = "applied",
    pairs: bool = False,
    backend: str = "auto",
    deterministic: bool = False,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Callable[[int], None] | None = None,
    partial: Partial | None = None,
) -> Statistics:
    layers = Layerwise(Path(folder), dtype=dtype, trust_remote_code=trust_remote_code)
    recorded = batches if isinstance(batches, Batches) else None
    model = layers.model
    run = {"run": what_runs(pretrained(model).base_model, backend, deterministic)}
    options = {"gates": gates, "pairs": pairs}
    with ExitStack() as undo:
        undo.callback(layers.close)
        stats = undo.enter_context(
            observe(model, backend=backend, deterministic=deterministic, **options)
        )
        undo.enter_context(torch.inference_mode())
        stream = Stream(layers, forward_of(model), stats)
        undo.enter_context(stream.installed())
        for batch in batches:
            stream.add(Batch.of(batch))
        while stream.step():
            pass
    return completed(stats, recorded, run)
