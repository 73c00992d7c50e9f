"""The loop: batches through a model, statistics out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

import reap_kernels
from reap.errors import ReapError
from reap.model import compat
from reap.model.experts import pretrained
from reap.model.info import ModelInfo
from reap.model.mtplayer import Mtp
from reap.model.unpacked import said_of_model
from reap.observation.patch import observe
from reap.runs.heads import own_mtp
from reap.runs.meetings import Meetings
from reap.runs.partial import Partial
from reap.runs.ranks import Ranks
from reap.runs.stability import Stable, Watch
from reap.statistics.stats import Statistics
from reap.statistics.trace import Trace
from reap.text.batching import Batch, Batches, batches_in, check_ids


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch | Mapping[str, Any]],
    *,
    gates: str = "applied",
    pairs: bool = False,
    outputs: bool = False,
    coalitions: int = 0,
    logits: bool = False,
    trace: Trace | None = None,
    backend: str = "auto",
    deterministic: bool = False,
    mtp: Mtp | bool = True,
    progress: Callable[[int], None] | None = None,
    partial: Partial | None = None,
    until: Stable | None = None,
    ranks: Ranks | None = None,
) -> Statistics:
    """Run `batches` through `model` and return the statistics of its experts, by domain.

    A batch is one of `reap.batches`, or what a DataLoader yields (`Batch.of`); of the former the
    statistics also record which text it was, and what ran it. Where a batch says which tokens are
    `counted`, all of them run and only those go into the statistics. The language-model head does
    not run: nothing here needs logits. `mtp` is the model's multi-token-prediction layer; True
    loads the one that its folder has, and leaves one out, with a line in the log, that is not known
    how to run. `progress` is called after each batch with its number of tokens. `partial` takes up
    what an earlier run measured, and keeps what this one did when it ends early inside
    `partial.kept`. With `until` the run ends before the text does once it is stable, where `ranks`
    share it that of all; why it ended is in the statistics' `data`. The other options are those of
    `observe`, and so are the errors; ReapError also for batches without a single token that counts,
    for a token that the model does not embed, and for text too short for `until`. The model is in
    eval mode meanwhile, and left as it was found, whatever happens.
    """
    forward = forward_of(model)
    run: dict[str, Any] = {"run": what_runs(pretrained(model).base_model, backend, deterministic)}
    recorded = batches if isinstance(batches, Batches) else None
    if until is not None:
        run["until"] = until.describe()
        if recorded is not None:
            until.check_text(recorded)
    if partial is not None:
        partial.refuse_trace(trace)
    if partial is not None and recorded is None:
        raise ReapError("a run can be taken up again only with batches of reap.batches")
    with (
        observe(
            model,
            gates=gates,
            pairs=pairs,
            outputs=outputs,
            coalitions=coalitions,
            logits=logits,
            trace=trace,
            backend=backend,
            deterministic=deterministic,
            mtp=own_mtp(model) if mtp is True else mtp or None,
        ) as stats,
        eval_mode(model),
        torch.inference_mode(),
    ):
        watch = None if until is None else watching(until, stats.model, ranks)
        if partial is not None and recorded is not None:
            for batch in partial.take_up(stats, recorded, run, watch):
                if progress is not None:
                    progress(batch.tokens)
        if isinstance(watch, Meetings):
            watch.start()

        def sums() -> np.ndarray:
            assert watch is not None
            return watch.sums.read([stats] if partial is None else partial.both(stats))

        def save() -> None:
            if partial is not None and recorded is not None:
                partial.keep(stats, [], recorded, run)

        rest, seen = batches_in(batches), 0
        while watch is None or not watch.stable:
            if watch is not None and recorded is not None:
                recorded.until = watch.bound()
            for batch in rest if recorded is None else recorded:
                seen = seen + 1 if recorded is None else recorded.position
                if watch is not None:
                    watch.passed(seen - 1, sums)
                with stats.domain(batch.domain), stats.counting(batch.counted):
                    forward(batch)
                if watch is not None:
                    watch.passed(seen, sums)
                if partial is not None and recorded is not None:
                    partial.mark(stats, batch.domain, recorded, run)
                if progress is not None:
                    progress(batch.tokens)
                if watch is not None and watch.stable:
                    break
            if recorded is not None:
                seen = recorded.position
                if watch is not None:
                    watch.passed(seen, sums)  # with batches of others behind the last
            if watch is None or not watch.meet(seen, save):
                break
    total = stats if partial is None else partial.total(stats)
    if watch is not None:
        run["ended"] = watch.ended()
    return completed(total, recorded, run)


def watching(
    until: Stable, model: ModelInfo, ranks: Ranks | None, streamed: bool = False
) -> Watch | Meetings:
    """What says when a run may end, of one process or of several."""
    if ranks is None:
        return Watch(until, model, streamed)
    return Meetings(until, model, streamed, ranks)


def completed(total: Statistics, text: Batches | None, run: dict[str, Any]) -> Statistics:
    """`total` with what went in, where that is known. ReapError when it holds no tokens."""
    shared = False
    if text is not None or "ended" in run:
        about = ({} if text is None else text.describe()) | run
        shared = "shard" in about
        if shared:
            about["shard"]["versions"] = total.versions
        total.data = [about]
    if total.tokens == 0 and not shared:  # of few batches a share may have none
        raise ReapError("the calibration data has no tokens that count: nothing was observed")
    return total


def forward_of(model: nn.Module) -> Callable[[Batch], None]:
    """What runs a batch through `model` without its head. ReapError, then, for a token that the
    model does not embed; here for one without weights."""
    base = pretrained(model).base_model
    options = {"use_cache": False} if _takes_use_cache(base) else {}
    device = _input_device(base)

    def forward(batch: Batch) -> None:
        check_ids(base, batch)
        # Without padding no mask is the same, and lets attention take its causal fast path.
        padded = not bool(batch.attention_mask.all())
        mask = batch.attention_mask.to(device) if padded else None
        base(input_ids=batch.input_ids.to(device), attention_mask=mask, **options)

    return forward


def what_runs(model: nn.Module, backend: str, deterministic: bool) -> dict[str, Any]:
    """What, beside the text and the versions, decides the bits of the statistics. Of a GPU that is
    its name, not its number: processes that share a run have one each. Weights on the meta device
    are elsewhere, and come where the others are."""
    weights = list(model.parameters())
    stored = said_of_model(model)
    return {
        **({"weights": stored} if stored else {}),
        "dtype": ", ".join(sorted({str(w.dtype).removeprefix("torch.") for w in weights})),
        "device": ", ".join(sorted({_device_name(w.device) for w in weights if not w.is_meta})),
        "backend": backend_said(backend),
        "deterministic": deterministic,
    }


def backend_said(backend: str) -> str:
    """A backend's name; of "auto" with those that it chooses among here."""
    if backend != "auto":
        return backend
    available = [name for name, reason in reap_kernels.backends().items() if reason is None]
    return f"auto of {', '.join(available)}"


def _device_name(device: torch.device) -> str:
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return f"{device.type}{name}"


def _takes_use_cache(model: nn.Module) -> bool:
    parameters = inspect.signature(type(model).forward).parameters
    return "use_cache" in parameters or any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
    )


def _input_device(model: Any) -> torch.device:
    """Where token ids go. Offloaded embeddings are on "meta" and fetch their inputs themselves."""
    embeddings = model.get_input_embeddings()
    device = embeddings.weight.device
    if device.type != "meta":
        return device
    if not compat.is_offloaded(embeddings):
        raise ReapError(f"{type(model).__name__} is on the meta device: load the model's weights")
    return torch.device("cpu")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
