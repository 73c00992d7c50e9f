"""The calibration loop: the statistics of a plain loop, no head, a model left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from brute import check
from mtps import saved_with_mtp
from tiny import model_types, tiny_inputs, tiny_model

from reap.errors import ReapError
from reap.model.load import load_model, load_mtp
from reap.observation.patch import observe
from reap.runs.calibration import calibrate
from reap.text.batching import Batch, batches


def rows(model: Any, *lengths: int, domain: str = "code", seed: int = 1) -> Batch:
    return Batch(**tiny_inputs(model, lengths=list(lengths), seed=seed), domain=domain)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in model_types() if t != "diffusion_gemma"])
def test_every_architecture(model_type: str) -> None:
    assert_same_as_a_plain_loop(model_type)


# Text alone, inside a composite, a hybrid, a token classifier without a head to leave out.
@pytest.mark.parametrize(
    "model_type", ["qwen3_moe", "gemma4", "nemotron_h", "openai_privacy_filter", "llama4_text"]
)
def test_the_same_as_a_plain_loop(model_type: str) -> None:
    assert_same_as_a_plain_loop(model_type)


def assert_same_as_a_plain_loop(model_type: str) -> None:
    model = tiny_model(model_type)
    batch = rows(model, 6, 3)
    stats = calibrate(model, [batch])
    with torch.no_grad(), observe(model) as plain, plain.domain("code"):
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    assert stats.tokens == plain.tokens == 9 and stats.domains == ("code",)
    for name in stats.layers:
        assert torch.equal(stats[name].count, plain[name].count)
        check(stats[name], {"weighted_sum": plain[name].weighted_sum}, rtol=1e-5)


def test_domains_progress_and_no_head() -> None:
    model = tiny_model("qwen3_moe")

    def no_head(*_: Any) -> None:
        raise AssertionError("the head ran")

    model.lm_head.register_forward_hook(no_head)
    batches = [rows(model, 9, 4), rows(model, 5, domain="prose"), rows(model, 8, domain="code")]
    seen: list[int] = []
    stats = calibrate(model, iter(batches), progress=seen.append, pairs=True, gates="renormalized")
    assert seen == [13, 5, 8] and stats.tokens == 26
    assert [stats.select(domain).tokens for domain in ("code", "prose")] == [21, 5]
    assert stats.pairs and stats.gates == "renormalized"


def test_statistics_can_be_used_after_inference_mode() -> None:
    """Added to, and summed with others, outside of the loop's inference mode."""
    model = tiny_model("mixtral")
    one, two = (calibrate(model, [rows(model, 7, seed=seed)]) for seed in (1, 2))
    both = calibrate(model, [rows(model, 7, seed=seed) for seed in (1, 2)])
    assert one + two == both


@pytest.mark.parametrize(
    "batches", [[], [Batch(torch.zeros(1, 4).long(), torch.zeros(1, 4).long(), "code")]]
)
def test_no_tokens(batches: list[Batch]) -> None:
    with pytest.raises(ReapError, match="has no tokens"):
        calibrate(tiny_model("mixtral"), batches)


def test_a_model_without_weights_is_an_error() -> None:
    model = tiny_model("mixtral").to("meta")
    with pytest.raises(ReapError, match="MixtralModel is on the meta device: load"):
        calibrate(model, [rows(model, 5)])


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_the_model_is_left_as_it_was(error: type[BaseException] | None) -> None:
    """Training flags of all modules, which differ here, and the experts implementation."""
    model = tiny_model("qwen3_moe").train()
    model.model.layers[2].eval()
    before = {name: module.training for name, module in model.named_modules()}
    implementation = model.config._experts_implementation_internal

    def progress(_: int) -> None:
        assert not any(module.training for module in model.modules())
        if error is not None:
            raise error

    try:
        calibrate(model, [rows(model, 5)], progress=progress)
    except BaseException as caught:
        assert type(caught) is error
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.config._experts_implementation_internal == implementation


def test_which_text_it_was_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 9)

    class Tokenizer:
        eos_token_id = pad_token_id = None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) % 32 for letter in text]}

    text = batches(str(tmp_path / "a.txt"), Tokenizer(), seq_len=8, max_tokens=20)
    (data,) = calibrate(tiny_model("mixtral"), text).data
    assert data["tokens"] == 20 and data["sources"][0]["domain"] == "a"


def test_ids_of_another_tokenizer_are_named() -> None:
    model = tiny_model("mixtral")
    batch = rows(model, 5)
    known = model.get_input_embeddings().weight.shape[0]
    batch.input_ids[0, 2] = known
    with pytest.raises(ReapError, match=f"token id {known} in domain 'code'.*own tokenizer"):
        calibrate(model, [batch])


def test_nan_weights_are_named() -> None:
    model = tiny_model("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj[3, 0, 0] = float("inf")
    with pytest.raises(ReapError, match=r"layers\.1\..*expert 3"):
        calibrate(model, [rows(model, 9, 9, seed=seed) for seed in range(3)])


def test_the_mtp_layer_of_the_models_folder(tmp_path: Path) -> None:
    """It is found where the model came from, unless it is not wanted, and statistics with it are
    not those of a model without."""
    made = saved_with_mtp(tmp_path / "model", "qwen3_next")
    model = load_model(made.folder)
    batches = [rows(model, 6, 3)]
    found, plain = calibrate(model, batches), calibrate(model, batches, mtp=False)
    assert found[made.names.experts].tokens == 5 + 2 and found.tokens == 9
    assert plain.layers == found.layers[:-1]
    for name in plain.layers:
        assert torch.equal(plain[name].count, found[name].count)
    given = calibrate(made.model, batches, mtp=load_mtp(model) or False)
    assert given.layers == found.layers
    assert torch.equal(given[made.names.experts].count, found[made.names.experts].count)
    with pytest.raises(ReapError, match="4 MoE layers against 5, mtp.layers.0.mlp.experts in one"):
        plain + found
