"""A plan as a mask: the masked forward against the plain one, ten plans against one.

The model is that of `calibrate`; plans keep half of the experts, drawn by number.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial

import torch

import reap
from bench import calibrate
from bench.gate import WrongResult
from bench.measure import TORCH, Settings, interleave, rows
from bench.row import Row
from reap.model.identity import describe
from reap.planning.plan import Plan
from reap.runs.masking import mask_of

PLAIN, MASKED = "plain forward", "reap: masked forward"
ONE, TEN = "reap: one plan", "reap: ten plans"


def run(settings: Settings) -> Iterator[Row]:
    for dtype in settings.dtypes:
        size = calibrate.fitted(dtype, settings)
        if size is None:
            settings.say(f"masks: skips {dtype}, one layer does not fit in memory")
            continue
        yield from _model(size, dtype, settings)


@torch.inference_mode()
def _model(size: calibrate.Size, dtype: str, settings: Settings) -> Iterator[Row]:
    model = calibrate.build(size, TORCH[dtype], settings.device)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(size.vocabulary, (size.batch, size.length), generator=g)
    batches = [reap.Batch(ids, torch.ones_like(ids), "bench")]
    info = describe(model)
    plans = {str(seed): _plan(info, seed) for seed in range(10)}
    mask = mask_of(model, plans["0"])
    there = ids.to(settings.device)

    def forward() -> torch.Tensor:
        return model(input_ids=there, use_cache=False).logits

    def masked() -> torch.Tensor:
        with mask.entered():
            return forward()

    whole = forward()
    if torch.equal(masked(), whole) or not torch.equal(forward(), whole):
        raise WrongResult("masks: a mask changes nothing, or is not undone")
    one = {"0": plans["0"]}
    alone = partial(reap.evaluate, model, batches, plans=one)
    among = partial(reap.evaluate, model, batches, plans=plans)
    if alone()["0"] != among()["0"]:
        raise WrongResult("masks: a plan among ten is measured otherwise than alone")
    forwards: dict[str, Callable[[], object]] = {PLAIN: forward, MASKED: masked}
    evaluations: dict[str, Callable[[], object]] = {ONE: alone, TEN: among}
    for calls in (forwards, evaluations):
        samples = interleave(calls, None, settings, wall=True)
        yield from rows("masks", (dtype, str(size), ids.numel()), samples, ours="reap")


def _plan(info: reap.ModelInfo, seed: int) -> Plan:
    rng = random.Random(seed)
    kept = {
        layer.name: tuple(sorted(rng.sample(range(layer.num_experts), layer.num_experts // 2)))
        for layer in info.layers
    }
    return Plan(info, "random", seed, kept)
