"""Statistics and outputs of observed models against brute force, and what observing may not do."""

from __future__ import annotations

import copy
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from brute import brute_force, check, eager_truth, run
from tiny import model_types, tiny_inputs, tiny_model
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from reap.errors import ReapError
from reap.model.experts import find_experts
from reap.observation import measure
from reap.observation.layers import Layer
from reap.observation.patch import _layers, observe
from reap.statistics.stats import Statistics

# Softmax renormalised or not, sigmoid with groups and bias, interleaved and transposed with biases,
# a hybrid, no gate half: the rest is in the sweep.
MAIN = (
    *("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "glm4_moe", "gpt_oss", "qwen3_next"),
    "nemotron_h",
)
OFF_INTERFACE = ("dbrx", "step3p7", "longcat_flash")
# All but block diffusion, which runs a canvas beside the prompt and has tests of its own.
PADDABLE = [t for t in (*model_types(), *OFF_INTERFACE) if t != "diffusion_gemma"]
# Types whose experts cannot be replaced by `moe_saliency`, and the reason that the log gives.
SLOT_BY_SLOT = {
    "inkling2": "no known kind",
    "inkling2_loop": "no known kind",
    "muse_spark": "norm after each expert",
    **{name: "not on transformers' experts interface" for name in OFF_INTERFACE},
}
# fp32 sums of fp32 products; bf16 rounds the inner tensor once (2**-9), norms average that out.
RTOL = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def assert_matches(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> None:
    """Outputs and counts of an observed run against an unobserved eager one, in fp32; every other
    statistic against the exact one of what the observed layers were given: a model may amplify
    the rounding of one layer's input a hundred times until the next."""
    expected, eager = eager_truth(model, inputs)
    keep = inputs["attention_mask"].flatten().bool()
    with observe(model, pairs=True, outputs=True, **options) as stats, brute_force(model) as truth:
        actual = run(model, inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert stats.layers and set(stats.layers) <= set(truth)
    renormalized = options.get("gates") == "renormalized"
    for name in stats.layers:
        assert stats[name].tokens == keep.sum()
        fields = truth[name].fields(renormalized=renormalized, keep=keep)
        check(stats[name], fields, rtol=RTOL[torch.float32])
        check(stats[name], {"count": eager[name].fields(keep=keep)["count"]}, rtol=0)


@pytest.mark.parametrize("gates", ["applied", "renormalized"])
@pytest.mark.parametrize("model_type", MAIN)
def test_main_architectures(model_type: str, gates: str) -> None:
    model = tiny_model(model_type)
    assert_matches(model, tiny_inputs(model), gates=gates)


@pytest.mark.sweep
@pytest.mark.parametrize("model_type", PADDABLE)
def test_every_architecture_with_padding(model_type: str, caplog: Any) -> None:
    """Right padding as well, so that all of them also prove that tokens arrive batch-major."""
    model = tiny_model(model_type)
    caplog.set_level(logging.WARNING, logger="reap")
    assert_matches(model, tiny_inputs(model, lengths=[6, 3]))
    said = " ".join(
        record.message for record in caplog.records if "runs as it is" in record.message
    )
    assert SLOT_BY_SLOT[model_type] in said if model_type in SLOT_BY_SLOT else not said


def test_tied_experts_share_their_statistics() -> None:
    """Block diffusion: the decoder's experts are the encoder's, called a second time."""
    model = tiny_model("diffusion_gemma")
    inputs = tiny_inputs(model)
    inputs["decoder_input_ids"] = inputs["input_ids"][:, :5]
    expected, truth = eager_truth(model, inputs)
    with observe(model) as stats:
        torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-4)
    assert len(stats.layers) == 4 and all("encoder" in name for name in stats.layers)
    for name in stats.layers:
        twin = truth[name.replace("encoder.language_model", "decoder")].fields()
        once = truth[name].fields()
        both = {field: once[field] + twin[field] for field in once if field != "peak"}
        check(stats[name], {k: v for k, v in both.items() if k[:2] != "co"}, rtol=1e-5)
        assert stats[name].tokens == 2 * 9 + 2 * 5


@pytest.mark.slow
@pytest.mark.parametrize("model_type", PADDABLE)
def test_every_architecture_in_bfloat16(model_type: str) -> None:
    assert_close_in_bfloat16(model_type)


@pytest.mark.parametrize("model_type", [*MAIN, "openai_privacy_filter"])
def test_main_architectures_in_bfloat16(model_type: str) -> None:
    assert_close_in_bfloat16(model_type)


def assert_close_in_bfloat16(model_type: str) -> None:
    """Rounding may route a token elsewhere, so truth follows the observed model's own routing."""
    model = tiny_model(model_type, dtype=torch.bfloat16)
    inputs = tiny_inputs(model)
    _, own = eager_truth(model, inputs)
    with observe(model) as stats, brute_force(model) as truth:
        run(model, inputs)
    for name in stats.layers:
        check(stats[name], truth[name].fields(), rtol=RTOL[torch.bfloat16])
        assert truth[name].output_error <= 1.2 * own[name].output_error + 1e-3


def test_a_module_that_computes_in_fp32_runs_as_it_is(caplog: Any) -> None:
    """openai_privacy_filter: its own forward is more accurate than its flags say."""
    model = tiny_model("openai_privacy_filter", dtype=torch.bfloat16)
    inputs = tiny_inputs(model)
    expected, _ = eager_truth(model, inputs)
    with observe(model) as stats:
        actual = run(model, inputs)
    assert torch.equal(actual, expected) and stats.tokens == 18
    assert sum("more accurately" in record.message for record in caplog.records) == 1


def state(model: nn.Module) -> Any:
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return (
        {key: config._experts_implementation_internal for key, config in configs.items()},
        {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in model.named_modules()
        },
        {name: vars(m).keys() for name, m in model.named_modules()},
        set(ALL_EXPERTS_FUNCTIONS),
    )


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("model_type", ["dots3_note", "aria", "llama4_text", "longcat_flash"])
def test_the_model_is_put_back(model_type: str, error: type[BaseException] | None) -> None:
    """Composite models whose parts differ, private copies of configurations, hooks."""
    model = tiny_model(model_type)
    if model_type == "aria":
        model.config.text_config._experts_implementation_internal = "grouped_mm"
    before = state(model)
    inputs = tiny_inputs(model)
    expected = run(model, inputs)
    try:
        with observe(model):
            run(model, inputs)
            assert state(model) != before
            if error is not None:
                raise error
    except BaseException as caught:
        assert type(caught) is error
    assert state(model) == before
    assert torch.equal(run(model, inputs), expected)


def test_an_interrupt_inside_a_forward_leaves_no_trace() -> None:
    model = tiny_model("qwen3_moe")
    before = state(model)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with observe(model) as stats:
        handle = model.model.layers[2].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(model, tiny_inputs(model, lengths=[9, 5]))
        handle.remove()
        run(
            model, tiny_inputs(model, batch=3, length=4)
        )  # not judged by the mask of the first call
        assert stats[stats.layers[-1]].tokens == 12
    assert state(model) == before


def test_two_models_at_once_and_apart() -> None:
    first, second = tiny_model("qwen3_moe", seed=1), tiny_model("mixtral", seed=2)
    inputs = tiny_inputs(first)
    with observe(first) as one:
        run(first, inputs)
    with observe(first) as a, observe(second) as b:
        run(first, inputs)
        run(second, inputs)
        run(second, inputs)
    assert a == one and (a.tokens, b.tokens) == (18, 36)
    assert "reap" not in ALL_EXPERTS_FUNCTIONS


def test_a_model_that_shares_its_configuration_is_not_observed() -> None:
    first = tiny_model("qwen3_moe")
    second = type(first)(first.config).eval()
    inputs = tiny_inputs(first)
    expected = run(second, inputs)
    with observe(first) as stats:
        assert torch.equal(run(second, inputs), expected)
        with observe(second):
            run(second, inputs)
        run(first, inputs)
    assert stats.tokens == 18
    assert first.config._experts_implementation_internal != "reap"


def test_nested_observation_is_refused() -> None:
    model = tiny_model("mixtral")
    with observe(model) as stats:
        with pytest.raises(ReapError, match="being observed already"), observe(model.model):
            pass
        run(model, tiny_inputs(model))
    assert stats.tokens == 18


class DTensor(nn.Parameter):
    """Told by its name: nothing else of torch's is needed to see one."""


@pytest.mark.parametrize(
    ("name", "mark"),
    [
        ("_is_expert_parallel", True),
        ("_hf_tp_plan", "moe_tp_experts"),
        ("down_proj", DTensor(torch.ones(8, 32, 20))),
    ],
)
def test_experts_that_are_split_over_processes_are_refused(name: str, mark: Any) -> None:
    """Of a part, counts and norms would be wrong and nothing would show it."""
    model = tiny_model("qwen3_moe")
    setattr(model.model.layers[2].mlp.experts, name, mark)
    with pytest.raises(ReapError, match=r"layers\.2.* split over processes"), observe(model):
        pass


def test_domains() -> None:
    model = tiny_model("qwen3_moe")
    code, prose = tiny_inputs(model, seed=1), tiny_inputs(model, seed=2)
    with observe(model) as stats:
        with stats.domain("code"):
            run(model, code)
        with stats.domain("prose"):
            run(model, prose)
    with observe(model) as alone, alone.domain("prose"):
        run(model, prose)
    assert stats.domains == ("code", "prose")
    assert stats.select("prose").layer(stats.layers[0]) == alone.layer(stats.layers[0])
    assert stats.tokens == 36


@pytest.mark.parametrize("model_type", ["qwen3_moe", "llama4_text", "gemma4", "longcat_flash"])
def test_counting(model_type: str) -> None:
    """Only some tokens of a call count, of which padding is none; the two halves are the whole."""
    model = tiny_model(model_type)
    inputs = tiny_inputs(model, lengths=[9, 5])
    counted = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    counts = [counted, ~counted, None]
    parts = []
    for tokens in counts:
        with observe(model) as stats, stats.counting(tokens):
            run(model, inputs)
        parts.append(stats)
    assert parts[0].tokens == int((counted & inputs["attention_mask"].bool()).sum())
    assert parts[0] + parts[1] == parts[2]
    with pytest.raises(ReapError, match=r"given \[9, 2\], and the model is called .* \[2, 9\]"):
        with observe(model) as stats, stats.counting(counted.T):
            run(model, inputs)


def test_partitions_of_batches_give_the_same_bits() -> None:
    model = tiny_model("qwen3_moe")
    batches = [tiny_inputs(model, seed=seed) for seed in range(4)]
    with observe(model) as whole:
        for batch in batches:
            run(model, batch)
    parts = []
    for some in (batches[2:], batches[:1], batches[1:2]):
        with observe(model) as stats:
            for batch in some:
                run(model, batch)
        parts.append(stats)
    assert parts[0] + parts[1] + parts[2] == whole


def test_sentinel_ids_are_left_out() -> None:
    """Expert parallelism marks slots of other processes with an id of E and a gate of zero."""
    model = tiny_model("qwen3_moe")
    experts = find_experts(model)[0].module
    hidden = torch.randn(3, 32)
    ids, gates = (
        torch.tensor([[0, 8], [8, 8], [3, 1]]),
        torch.tensor([[0.5, 0], [0, 0], [0.2, 0.8]]),
    )
    with observe(model) as stats, torch.no_grad():
        out = experts(hidden, ids, gates)
    assert stats[stats.layers[0]].count.tolist() == [1, 1, 0, 1, 0, 0, 0, 0]
    assert torch.equal(out[1], torch.zeros(32))


def test_nan_weights_are_named() -> None:
    model = tiny_model("qwen3_moe")
    experts = model.model.layers[2].mlp.experts
    with torch.no_grad():
        experts.down_proj[5] = float("nan")
    with pytest.raises(ReapError, match=r"layers\.2\.mlp\.experts.*expert 5"), observe(model):
        for seed in range(4):
            run(model, tiny_inputs(model, seed=seed))


def test_autocast_is_an_error() -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(ReapError, match="autocast"), observe(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run(model, tiny_inputs(model))


def test_grad_mode_works_and_says_that_no_gradient_flows(caplog: Any) -> None:
    model = tiny_model("qwen3_moe")
    with observe(model) as stats:
        model(**tiny_inputs(model))
    assert stats.tokens == 18
    assert sum("no gradient" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("model_type", ["deepseek_v3", "llama4_text"])
def test_layers_recomputed_in_a_backward_pass_count_once(model_type: str) -> None:
    """Gradient checkpointing runs them again, outside of a call that would say what is padding."""
    model = tiny_model(model_type).train()
    model.gradient_checkpointing_enable()
    with observe(model) as stats:
        model(**tiny_inputs(model, lengths=[9, 5])).logits.sum().backward()
    assert {stats[name].tokens for name in stats.layers} == {14}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "llama4_text"])
def test_threads_that_call_one_model(model_type: str) -> None:
    """Every call is judged by its own mask, and no sum loses an addend."""
    model = tiny_model(model_type)
    batches = [tiny_inputs(model, lengths=[9, 1 + i, 9 - i], seed=i) for i in range(8)]
    with observe(model) as alone:
        for batch in batches:
            run(model, batch)
    with observe(model) as stats, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda batch: run(model, batch), batches * 3))
    assert stats == alone + alone + alone


def test_a_model_without_weights_is_an_error() -> None:
    model = tiny_model("qwen3_moe").to("meta")
    inputs = {"input_ids": tiny_inputs(model)["input_ids"].to("meta")}
    with pytest.raises(ReapError, match=r"layers\.0.*meta device: load"), observe(model):
        run(model, inputs)


def test_a_copy_made_inside_is_an_error() -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(ReapError, match="copy of a model .* observed"), observe(model):
        run(copy.deepcopy(model), tiny_inputs(model))


def test_double_precision_runs_as_it_is() -> None:
    for model_type in ("qwen3_moe", "llama4_text"):
        model = tiny_model(model_type, dtype=torch.float64)
        model.config._experts_implementation_internal = "eager"  # the default has no kernel for it
        expected = run(model, tiny_inputs(model))
        with observe(model) as stats:
            assert torch.equal(run(model, tiny_inputs(model)), expected)
        assert stats.tokens == 18


@pytest.mark.parametrize("backend", ["nonsense", 7])
def test_an_unknown_backend_is_an_error_before_anything_runs(backend: Any) -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(ReapError, match="backend"), observe(model, backend=backend):
        pass


def test_something_else_than_a_model() -> None:
    for thing in (nn.Linear(2, 2), "a/path", None):
        with pytest.raises(ReapError, match="must be a transformers model"), observe(thing):
            pass


# Tracing the first takes seconds; its forward is no single graph.
@pytest.mark.parametrize(
    ("model_type", "way"),
    [
        ("qwen3_moe", "model.compile"),
        pytest.param("qwen3_moe", "torch.compile", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "beside", marks=pytest.mark.slow),
        *(
            ("llama4_text", way)
            for way in ("torch.compile", "fullgraph", "model.compile", "beside")
        ),
    ],
)
def test_a_compiled_model(model_type: str, way: str) -> None:
    """Compiled before it is observed, several times: no compiled code may hide from the hooks."""
    model = tiny_model(model_type)
    inputs = tiny_inputs(model, lengths=[9, 5])
    expected = run(model, inputs)
    if way == "model.compile":
        compiled: nn.Module = model
        model.compile(backend="eager")
    else:
        compiled = torch.compile(model, backend="eager", fullgraph=way == "fullgraph")
    for lengths in ([9, 5], [9, 3]):
        run(compiled, inputs)
        with observe(model if way == "beside" else compiled) as stats:
            run(compiled, tiny_inputs(model, lengths=lengths))
        assert {stats[name].tokens for name in stats.layers} == {sum(lengths)}
        torch.testing.assert_close(run(compiled, inputs), expected)
    assert torch._dynamo.eval_frame._stance.stance == "default"


@pytest.mark.parametrize("model_type", MAIN)
@pytest.mark.parametrize("lengths", [None, [9, 5]], ids=["whole", "padded"])
def test_no_layer_waits_for_its_device(model_type: str, lengths: Any, monkeypatch: Any) -> None:
    """On the meta device, where there is nothing to read: any wait for a value is an error."""
    model = tiny_model(model_type).to("meta")
    inputs = tiny_inputs(model, lengths=lengths)
    mask = inputs["attention_mask"].to("meta") if lengths else None
    ids, gates = (torch.zeros(18, 2, dtype=t, device="meta") for t in (torch.int64, torch.float32))
    monkeypatch.setattr(Layer, "check_device", lambda self, kind: None)  # which refuses it
    monkeypatch.setattr(measure, "accurate", lambda *_, **__: True)  # waits once, at the first call
    monkeypatch.setattr(Statistics, "check", lambda self: None)  # once, at the end
    hidden = torch.zeros(18, 32, device="meta")
    with torch.no_grad(), observe(model, pairs=True) as stats:
        for experts in find_experts(model):
            monkeypatch.setattr(
                type(model),
                "forward",
                lambda self, input_ids, attention_mask, experts=experts: experts.module(
                    hidden, ids, gates
                ),
            )
            out = model(input_ids=inputs["input_ids"], attention_mask=mask)
            assert out.is_meta and out.shape == hidden.shape
    assert {part.device.type for part in stats._parts.values()} == {"meta"}


def test_what_layers_have_in_common_is_found_once(monkeypatch: Any) -> None:
    """Layers of one class and state have one activation; one with another is asked for itself."""
    seen: list[nn.Module] = []
    activation_of = measure.activation_of

    def counted(module: nn.Module) -> str | None:
        seen.append(module)
        return activation_of(module)

    monkeypatch.setattr(measure, "activation_of", counted)
    model = tiny_model("qwen3_moe", num_hidden_layers=5)
    experts = [one.module for one in find_experts(model)]
    experts[3].act_fn = nn.GELU()
    with observe(model):
        activations = [_layers[module].activation for module in experts]
    assert activations == ["silu", "silu", "silu", "gelu", "silu"]
    assert seen == [experts[0], experts[3]]


def test_a_graph_cannot_be_captured(monkeypatch: Any) -> None:
    model = tiny_model("qwen3_moe")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with observe(model):
        layer = _layers[find_experts(model)[0].module]
        with pytest.raises(ReapError, match=r"layers\.0.* graph is being captured"):
            layer.check_device("cuda")
