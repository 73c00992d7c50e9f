"""Batches that stop before every layer: the statistics of a plain loop, bit for bit."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import saved
from greenlet import greenlet
from mtps import saved_with_mtp
from tiny import model_types, tiny_inputs, tiny_model
from transformers import MixtralModel
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from reap.errors import ReapError
from reap.model.load import load_model
from reap.runs.calibration import calibrate
from reap.runs.waves import calibrate_streamed
from reap.statistics.stats import Statistics
from reap.text.batching import Batch

QUICK = [
    "qwen3_moe",
    "gemma4",  # inside a composite model
    "nemotron_h",  # a hybrid
    "diffusion_gemma",  # the layers of its encoder and decoder have the same weights
    "zaya",  # passes a state from layer to layer
    "llama4_text",
    "dbrx",
    "openai_privacy_filter",  # without a head
]


def some(model_type: str, *, padded: bool = True) -> list[Batch]:
    """Batches of two domains in turn, of different lengths."""
    model = tiny_model(model_type)
    rows = [([9, 4], "code"), ([8, 8], "prose"), ([3, 9], "code")]
    return [
        Batch(**tiny_inputs(model, lengths=n if padded else [9, 9], seed=seed), domain=domain)
        for seed, (n, domain) in enumerate(rows)
    ]


def both(folder: Path, batches: list[Batch], **options: Any) -> list[Statistics]:
    """In memory, and layer by layer; a model that draws numbers draws the same."""
    found = []
    for run in (
        lambda: calibrate(load_model(folder, device="cpu"), batches, **options),
        lambda: calibrate_streamed(folder, batches, **options),
    ):
        torch.manual_seed(0)
        found.append(run())
    return found


def assert_the_same(folder: Path, model_type: str) -> None:
    saved(folder, model_type)
    padded = model_type != "diffusion_gemma"  # there, padding cannot be told
    plain, streamed = both(folder, some(model_type, padded=padded))
    assert streamed.digest() == plain.digest()
    assert streamed.domain_tokens == plain.domain_tokens and len(plain.domains) == 2


@pytest.mark.parametrize("model_type", QUICK)
def test_the_same_as_in_memory(tmp_path: Path, model_type: str) -> None:
    assert_the_same(tmp_path, model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in model_types() if name not in QUICK])
def test_every_architecture(tmp_path: Path, model_type: str) -> None:
    assert_the_same(tmp_path, model_type)


@pytest.mark.parametrize(
    "options",
    [
        {"pairs": True},
        {"gates": "renormalized"},
        {"backend": "reference"},
        {"deterministic": True, "pairs": True},
    ],
)
def test_options(tmp_path: Path, options: dict[str, Any]) -> None:
    saved(tmp_path)
    plain, streamed = both(tmp_path, some("qwen3_moe"), **options)
    assert streamed.digest() == plain.digest()


def test_progress_is_of_layers(tmp_path: Path) -> None:
    """It comes to all tokens, and not at the end alone."""
    saved(tmp_path)
    seen: list[int] = []
    calibrate_streamed(tmp_path, some("qwen3_moe"), progress=seen.append)
    assert sum(seen) == 41 and len(seen) == 3 * 4 and all(0 < step <= 5 for step in seen)


def suspended() -> int:
    gc.collect()
    return sum(type(thing) is greenlet and not thing.dead for thing in gc.get_objects())


def failing(error: type[BaseException]) -> Callable[..., Any]:
    original = MixtralDecoderLayer.forward
    calls = iter(range(100))

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == 7:
            raise error("in the middle")
        return original(self, *args, **kwargs)

    return forward


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError, ReapError])
def test_an_error_is_the_model_s_own(
    tmp_path: Path, monkeypatch: Any, error: type[BaseException]
) -> None:
    """With its traceback; nothing is left suspended, and no thread reads on."""
    saved(tmp_path, "mixtral")
    before, threads = suspended(), threading.active_count()
    monkeypatch.setattr(MixtralDecoderLayer, "forward", failing(error))
    with pytest.raises(error, match="in the middle") as caught:
        calibrate_streamed(tmp_path, some("mixtral"))
    names = [entry.name for entry in caught.traceback]
    assert names[-1] == "forward" and "calibrate_streamed" in names
    del caught
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)  # transformers does not wait for the threads that load
    assert suspended() == before and threading.active_count() <= threads


def test_a_forward_that_catches_everything_ends_too(tmp_path: Path, monkeypatch: Any) -> None:
    saved(tmp_path, "mixtral")
    original, before = MixtralDecoderLayer.__call__, suspended()

    def stubborn(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except BaseException:
            if str(self.self_attn.layer_idx) == "3":
                raise
            return args[0]

    def fail(tokens: int) -> None:
        raise RuntimeError("late")

    monkeypatch.setattr(MixtralDecoderLayer, "__call__", stubborn)
    with pytest.raises(RuntimeError, match="late"):
        calibrate_streamed(tmp_path, some("mixtral"), progress=fail)
    assert suspended() == before


def added(what: Callable[[Any], torch.Tensor]) -> Callable[..., Any]:
    """A forward of the model whose embeddings get something added."""
    original = MixtralModel.forward

    def forward(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return original(self, inputs_embeds=self.embed_tokens(input_ids) + what(self), **kwargs)

    return forward


@pytest.mark.parametrize(
    ("what", "named"),
    [
        (lambda self: self.layers[2].input_layernorm(torch.ones(32)), "2.input_layernorm.weight"),
        (lambda self: torch.ones(32) @ self.layers[1].self_attn.q_proj.weight, "1.self_attn.q_pr"),
        (lambda self: self.layers[1].self_attn.q_proj.weight.detach()[0], "1.self_attn.q_proj.w"),
        (lambda self: self.layers[0].self_attn.k_proj.weight.T.sum(), "0.self_attn.k_proj.w"),
        (lambda self: torch.stack([*self.layers[0].mlp.gate.parameters()]).sum(), "a weight"),
    ],
)
def test_weights_that_are_used_outside_of_their_layer(
    tmp_path: Path, monkeypatch: Any, what: Callable[[Any], torch.Tensor], named: str
) -> None:
    saved(tmp_path, "mixtral")
    monkeypatch.setattr(MixtralModel, "forward", added(what))
    with pytest.raises(ReapError, match=f"{named}.* is used outside of its layer's own call"):
        calibrate_streamed(tmp_path, some("mixtral"))


def test_a_layer_in_another_thread_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    saved(tmp_path, "mixtral")
    original = MixtralDecoderLayer.__call__

    def threaded(self: Any, *args: Any, **kwargs: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(original, self, *args, **kwargs).result()

    monkeypatch.setattr(MixtralDecoderLayer, "__call__", threaded)
    with pytest.raises(
        ReapError, match=r"^MixtralDecoderLayer \(model.layers.0\) cannot be suspend"
    ):
        calibrate_streamed(tmp_path, some("mixtral"))


def test_a_layer_that_runs_twice(tmp_path: Path, monkeypatch: Any) -> None:
    saved(tmp_path, "mixtral")
    original = MixtralDecoderLayer.__call__

    def twice(self: Any, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, original(self, hidden, *args, **kwargs), *args, **kwargs)

    monkeypatch.setattr(MixtralDecoderLayer, "__call__", twice)
    plain, streamed = both(tmp_path, some("mixtral"))
    assert streamed.digest() == plain.digest() and plain.tokens == 82


@pytest.mark.parametrize("mtp", [True, False])
def test_multi_token_prediction(tmp_path: Path, mtp: bool) -> None:
    """That layer stays in memory, and runs behind the others."""
    saved_with_mtp(tmp_path, "deepseek_v3")
    plain, streamed = both(tmp_path, some("deepseek_v3"), mtp=mtp)
    assert streamed.digest() == plain.digest()
    assert len(streamed.layers) == 3 + mtp


def test_tokens_that_do_not_count(tmp_path: Path) -> None:
    saved(tmp_path)
    batches = [
        replace(batch, counted=(batch.input_ids % 3 > 0) & batch.attention_mask.bool())
        for batch in some("qwen3_moe")
    ]
    plain, streamed = both(tmp_path, batches)
    assert streamed.digest() == plain.digest() and 0 < plain.tokens < 41
