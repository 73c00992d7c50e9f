"""A quantised checkpoint is, in all that is made of it, the same weights saved unquantised."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import MODEL, invoke, refused, run_json
from folders import edit_config, some_plan, tensors_of
from mtps import saved_with_mtp
from packers import KINDS, packed
from safetensors.torch import save_file
from tiny import tiny_inputs, tiny_model

from reap.checkpoint.pruning import prune
from reap.checkpoint.verification import verify
from reap.errors import ReapError
from reap.files.folder import open_folder
from reap.model.layerwise import Layerwise
from reap.model.load import load_model, load_mtp
from reap.model.mtplayer import embedding_names
from reap.model.unpacked import (
    Unpacked,
    open_stored,
    said_of_folder,
    said_of_model,
    unpacked_entries,
)
from reap.runs.calibration import calibrate
from reap.runs.waves import calibrate_streamed
from reap.statistics.stats import Statistics
from reap.text.batching import Batch

QUICK = ("fp8 with cut blocks", "mxfp4", "int4 asymmetric", "modelopt fp8", "gptq by order", "awq")
# Of the others only the weights are compared, but in the slow tests.
EACH = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in KINDS
]  # fmt: skip


def some(model_type: str) -> list[Batch]:
    model = tiny_model(model_type)
    rows = [([9, 4], "code"), ([8, 8], "prose")]
    return [
        Batch(**tiny_inputs(model, lengths=lengths, seed=seed), domain=domain)
        for seed, (lengths, domain) in enumerate(rows)
    ]


def assert_same_sums(found: Statistics, expected: Statistics) -> None:
    assert list(found.layers) == list(expected.layers) and found.tokens == expected.tokens
    for domain in expected.domains:
        for name in expected.layers:
            ours, theirs = (stats.select(domain)[name] for stats in (found, expected))
            assert ours == theirs


@pytest.mark.parametrize("name", KINDS)
def test_weights_are_those_by_hand(name: str, tmp_path: Path) -> None:
    made, plain = packed(tmp_path, name)
    model, whole = load_model(made, device="cpu"), load_model(plain, device="cpu")
    expected = dict(whole.named_parameters())
    for weight, value in model.named_parameters():
        other = expected[weight]
        assert value.dtype == other.dtype and torch.equal(value, other), weight
    told = f"{KINDS[name].said}, dequantised"
    assert said_of_model(model) == said_of_folder(open_folder(made)) == told


@pytest.mark.parametrize("name", EACH)
def test_statistics_are_those_of_the_weights_by_hand(name: str, tmp_path: Path) -> None:
    made, plain = packed(tmp_path, name)
    batches = some(KINDS[name].model_type)
    model, whole = load_model(made, device="cpu"), load_model(plain, device="cpu")
    truth = calibrate(whole, batches)
    assert_same_sums(calibrate(model, batches), truth)
    with closing(Layerwise(made)) as layers:
        assert said_of_model(layers.model) == f"{KINDS[name].said}, dequantised"
        assert all(unit.nbytes != layers.stored(unit) for unit in layers.units)
    assert_same_sums(calibrate_streamed(made, batches), truth)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def old_name(name: str, kept: Mapping[str, tuple[int, ...]]) -> str:
    expert = re.fullmatch(r"(.*\.experts)\.(\d+)(\..*)", name)
    return f"{expert[1]}.{kept[expert[1]][int(expert[2])]}{expert[3]}" if expert else name


@pytest.mark.parametrize("name", EACH)
def test_pruned_in_the_same_format(name: str, tmp_path: Path) -> None:
    """What stays of the packed checkpoint is what was there; it computes what the unpacked does."""
    made, plain = packed(tmp_path, name)
    plan = some_plan(plain, keep=3)
    report = prune(made, plan, tmp_path / "small")
    assert report.unchecked is None
    prune(plain, plan, tmp_path / "small plain")
    before, after = tensors_of(made), tensors_of(tmp_path / "small")
    for tensor, value in after.items():
        old = before[old_name(tensor, plan.kept)]
        if value.shape != old.shape:  # of all experts
            number = re.findall(r"layers\.\d+\.", tensor)[0]
            (kept,) = (ids for layer, ids in plan.kept.items() if number in layer)
            old = old[list(kept)]
        assert value.dtype == old.dtype and torch.equal(bytes_of(value), bytes_of(old)), tensor
    settings = [json.loads((at / "config.json").read_text()) for at in (made, tmp_path / "small")]
    assert settings[0].get("quantization_config") == settings[1].get("quantization_config")
    found = verify(tmp_path / "small", made)
    assert found.problems == () and found.ignored == ()
    inputs = tiny_inputs(tiny_model(KINDS[name].model_type))
    with torch.no_grad():
        ours, theirs = (
            load_model(tmp_path / folder, device="cpu")(**inputs).logits
            for folder in ("small", "small plain")
        )
    assert torch.equal(ours, theirs)


def test_a_model_in_another_dtype(tmp_path: Path) -> None:
    made, plain = packed(tmp_path, "fp8")
    for dtype in ("float32", "float16"):
        ours, theirs = (load_model(at, dtype=dtype, device="cpu") for at in (made, plain))
        for (_, one), (_, other) in zip(
            ours.named_parameters(), theirs.named_parameters(), strict=True
        ):
            assert one.dtype == other.dtype == getattr(torch, dtype) and torch.equal(one, other)


def test_weights_that_stay_in_fp32(tmp_path: Path, monkeypatch: Any) -> None:
    """Where a model keeps some, no weight is rounded on the way to them."""
    made, plain = packed(tmp_path, "fp8")
    kept = "transformers.Qwen3MoeForCausalLM._keep_in_fp32_modules_strict"
    monkeypatch.setattr(kept, {"o_proj"}, raising=False)
    ours, theirs = (load_model(at, device="cpu") for at in (made, plain))
    name = "model.layers.0.self_attn.o_proj.weight"
    assert ours.get_parameter(name).dtype == torch.float32
    assert (ours.get_parameter(name) != ours.get_parameter(name).bfloat16()).any()
    for (_, one), (_, other) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_a_configuration_without_a_dtype(tmp_path: Path) -> None:
    """The one that plain weights have; not the one in which packed ones are multiplied."""
    made, _ = packed(tmp_path, "gptq")
    edit_config(made, dtype=None)
    assert load_model(made, device="cpu").dtype == torch.bfloat16


def test_experts_of_all_at_once_in_fp8(tmp_path: Path) -> None:
    """As transformers saves a model that it holds in FP8."""
    made, plain = packed(tmp_path, "fp8")
    stored, truths = tensors_of(made), tensors_of(plain)
    for layer in range(2):
        module = f"model.layers.{layer}.mlp.experts."
        for ending, of in (("", ".weight"), ("_scale_inv", ".weight_scale_inv")):
            parts = {
                part: torch.stack(
                    [stored.pop(f"{module}{e}.{part}{of}").view(torch.uint8) for e in range(8)]
                )
                for part in ("gate_proj", "up_proj", "down_proj")
            }
            dtype = torch.float8_e4m3fn if of == ".weight" else torch.float32
            joined = torch.cat([parts["gate_proj"], parts["up_proj"]], dim=1)
            stored[f"{module}gate_up_proj{ending}"] = joined.view(dtype)
            stored[f"{module}down_proj{ending}"] = parts["down_proj"].view(dtype)
    save_file(stored, made / "model.safetensors", {"format": "pt"})
    model = load_model(made, device="cpu")
    down = model.get_parameter("model.layers.1.mlp.experts.down_proj")[5]
    assert torch.equal(down, truths["model.layers.1.mlp.experts.5.down_proj.weight"].bfloat16())


@pytest.mark.parametrize("name", ["fp8", "gptq by order"])
def test_multi_token_prediction(tmp_path: Path, name: str) -> None:
    """Its layer is quantised as the others are."""
    sizes = {"moe_intermediate_size": 32, "intermediate_size": 32, "num_hidden_layers": 4}

    def save(folder: Path) -> None:
        saved_with_mtp(folder, "glm4_moe", dtype=torch.bfloat16, **sizes)

    made, plain = packed(tmp_path, name, save=save)
    ours, theirs = (load_mtp(load_model(at, device="cpu")) for at in (made, plain))
    assert ours is not None and theirs is not None and ours.layers == theirs.layers
    own = embedding_names(ours.stack)  # which is in neither
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for weight, value in ours.state_dict().items():
        if weight.removeprefix("stack.") in own:
            continue
        assert value.dtype == expected[weight].dtype and torch.equal(value, expected[weight])
    batches = some("glm4_moe")
    sums = [calibrate(load_model(at, device="cpu"), batches) for at in (made, plain)]
    assert_same_sums(*sums)
    assert len(sums[0].layers) == 4


def test_what_is_read_and_held(tmp_path: Path) -> None:
    """A weight counts the bytes of its parts, and is handed out once."""
    made, _ = packed(tmp_path, "gptq")
    stored = open_stored(open_folder(made))
    assert isinstance(stored, Unpacked)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    raw = tensors_of(made)
    own = [x for key, x in raw.items() if key.startswith(name.removesuffix("weight"))]
    assert stored.nbytes([name]) == sum(x.nbytes for x in own) and len(own) == 4
    meta = stored.on_meta([name, "model.norm.weight"])
    assert (meta[name].dtype, meta[name].shape) == (torch.float16, (32, 32))
    found = stored.read([name, "model.norm.weight"])
    assert (found[name].get_dtype(), found[name].get_shape()) == ("F16", [32, 32])
    value = found[name][...]
    with pytest.raises(AssertionError):
        found[name][...]
    later = stored.state()[name]
    assert torch.equal(later[...], value) and torch.equal(later[3:5], value[3:5])
    assert torch.equal(found["model.norm.weight"][...], raw["model.norm.weight"])


def damaged(folder: Path, name: str, change: Any) -> None:
    tensors = tensors_of(folder)
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("streamed", [False, True])
def test_a_value_that_cannot_be_is_said_of_its_tensor(tmp_path: Path, streamed: bool) -> None:
    made, _ = packed(tmp_path, "gptq by order")
    stem = "model.layers.1.mlp.experts.6.down_proj"
    damaged(made, f"{stem}.g_idx", lambda index: index + 1)
    with pytest.raises(ReapError, match=rf"{stem}.qweight has inputs of the groups 1 to 2") as told:
        calibrate_streamed(made, some("qwen3_moe")) if streamed else load_model(made, device="cpu")
    assert "\n" not in str(told.value)


def test_weights_that_accelerate_would_leave_on_disk(tmp_path: Path, monkeypatch: Any) -> None:
    """It reads them from the files, where they are packed."""
    made, plain = packed(tmp_path, "fp8")
    places = "transformers.Qwen3MoeForCausalLM.hf_device_map"
    monkeypatch.setattr(places, {"model": "cpu", "lm_head": "disk"}, raising=False)
    load_model(plain, device="cpu")
    with pytest.raises(ReapError, match="left over on disk would be read without being dequant"):
        load_model(made, device="cpu")


def test_formats_that_need_their_package(tmp_path: Path) -> None:
    made, _ = packed(tmp_path, "gptq")
    edit_config(made, quantization_config={"quant_method": "hqq"})
    line = f"{made} is quantised by hqq, .* without its package \\(pip install hqq\\)"
    for run in (lambda: load_model(made), lambda: Layerwise(made)):
        with pytest.raises(ReapError, match=line):
            run()
    tensors = {"a": ("F32", (2,))}
    assert unpacked_entries({"quantization_config": {"quant_method": "hqq"}}, tensors) is tensors
    assert unpacked_entries({"quantization_config": {"quant_method": "awq"}}, tensors) is tensors


def test_the_command_line_says_it(tmp_path: Path) -> None:
    made, plain = packed(tmp_path, "int4", vocab_size=2048)
    for file in MODEL.glob("token*"):
        (made / file.name).write_bytes(file.read_bytes())
    (tmp_path / "a.txt").write_text("def f(x):\n    return x + 1\n" * 40)
    text = ("--data", tmp_path / "a.txt", "--seq-len", 32, "--max-tokens", 64)
    said = KINDS["int4"].said
    for mode in ("--no-stream", "--stream"):
        out = tmp_path / f"{mode}.st"
        code, _, err = invoke("calibrate", made, *text, mode, "--out", out)
        assert code == 0 and f", {said}, dequantised on cpu" in err, err
        assert Statistics.load(out).data[0]["run"]["weights"] == f"{said}, dequantised"
    assert run_json("info", made)["quantised"] == f"{said}, dequantised"
    assert run_json("info", plain)["quantised"] == "no"
    edit_config(made, quantization_config={"quant_method": "gptq", "bits": 5, "group_size": 8})
    assert "gptq has bits 5: it must be one of 2, 3, 4, 8" in run_json("info", made)["quantised"]
    wrong = refused("calibrate", made, *text, "--out", tmp_path / "b.st")
    assert "gptq has bits 5" in wrong
