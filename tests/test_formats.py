"""What is said of a format and what is stored fit together, or one line names the tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from packers import KINDS
from torch import Tensor

from reap.errors import ReapError
from reap.model import formats
from reap.model.packed import Entries, Packing, unpacking
from reap.model.stored import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}
STEM = "model.layers.0.mlp.experts.0.up_proj."


def entries_of(parts: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (NAMES[x.dtype], tuple(x.shape)) for name, x in parts.items()}


def stored(kind: str, shape: tuple[int, int] = (64, 96)) -> dict[str, Tensor]:
    fused = KINDS[kind].model_type == "gpt_oss"
    weight = torch.randn(3, *reversed(shape)) if fused else torch.randn(shape)
    parts, _ = KINDS[kind].pack(weight)
    stem = STEM if not fused else "model.layers.0.mlp.experts.down_proj"
    return {stem + name: x for name, x in parts.items()}


def packing(
    config: Mapping[str, Any], entries: Entries, tensors: Mapping[str, Tensor] | None = None
) -> Packing:
    def peek(name: str) -> list[int]:
        assert tensors is not None
        return tensors[name].tolist()

    settings = formats.settings_of({"quantization_config": config})
    assert settings is not None
    form = formats.format_of(settings)
    assert form is not None
    return unpacking(form, entries, peek if tensors else None)


def bits_of_weights(**changed: Any) -> Callable[[dict[str, Any]], None]:
    """In the configuration of compressed-tensors."""

    def change(config: dict[str, Any]) -> None:
        config["config_groups"]["group_0"]["weights"].update(changed)

    return change


def cut(name: str, *sizes: int) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[STEM + name] = tensors[STEM + name][tuple(slice(size) for size in sizes)]

    return change


def gone(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[STEM + name]

    return change


def of_dtype(name: str, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[STEM + name] = tensors[STEM + name].to(dtype)

    return change


def beside(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


INT8 = torch.zeros(4, 4, dtype=torch.int8)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        # Scales and their like that are missing, cut short or of other shapes.
        (
            "fp8",
            gone("weight_scale_inv"),
            "up_proj.weight .F8_E4M3 .64, 96.. is packed, and .*"
            "up_proj.weight_scale_inv is not there",
        ),
        ("fp8", cut("weight_scale_inv", 3), r"weight_scale_inv is F32 \[3, 6\]: that is no grid"),
        ("fp8", of_dtype("weight_scale_inv", torch.int32), "has scales of I32"),
        ("fp8", gone("weight"), r"weight_scale_inv \(F32 \[4, 6\]\) belongs to no weight that fp8"),
        ("mxfp8", cut("weight_scale_inv", 63), "that is no grid of blocks of"),
        ("int4", gone("weight_scale"), "up_proj.weight_scale is not there"),
        ("int4", cut("weight_scale", 64, 5), "weight_packed .* does not hold 80 numbers of 4 bits"),
        ("int4", cut("weight_scale", 63), r"up_proj.weight_scale is BF16 \[63, 6\]: beside .*must"),
        ("int4", of_dtype("weight_scale", torch.int32), "must be BF16 or F16 or F32"),
        ("int4 asymmetric", gone("weight_zero_point"), "weight_packed .* has no zero points, and"),
        ("int4 asymmetric", cut("weight_zero_point", 7), r"zero_point is I32 \[7, 6\]: .*\[8, 6\]"),
        (
            "int4 by order",
            cut("weight_g_idx", 95),
            r"weight_g_idx is I32 \[95\]: .* must be I32 \[",
        ),
        (
            "int8 by channel",
            cut("weight_packed", 64, 23),
            "weight_packed .* does not hold 96 numbers",
        ),
        ("w8a8", gone("weight_scale"), "up_proj.weight_scale is not there"),
        ("w8a8 asymmetric", gone("weight_zero_point"), "weight .I8 .* has no zero points"),
        ("nvfp4", gone("weight_global_scale"), "has no weight_global_scale beside it"),
        ("nvfp4", cut("weight_scale", 64, 5), r"weight_scale is F8_E4M3 \[64, 5\]: .*\[64, 6\]"),
        ("modelopt", gone("weight_scale_2"), "up_proj.weight_scale_2 is not there"),
        ("modelopt", cut("weight_scale", 64, 5), r"weight_scale is F8_E4M3 \[64, 5\]: beside"),
        (
            "gptq",
            gone("scales"),
            "up_proj.qweight .I32 .12, 64.. is packed, and .*up_proj.scales is",
        ),
        ("gptq", gone("qzeros"), "up_proj.qzeros is not there"),
        (
            "gptq",
            gone("qweight"),
            r"up_proj.qzeros \(I32 \[6, 8\]\) belongs to no weight that gptq",
        ),
        (
            "gptq",
            cut("scales", 5),
            r"up_proj.scales is F16 \[5, 64\]: .* must be BF16 or F16 \[6, 6",
        ),
        ("gptq", cut("qzeros", 6, 7), r"up_proj.qzeros is I32 \[6, 7\]"),
        ("gptq", cut("g_idx", 90), r"up_proj.g_idx is I32 \[90\]"),
        ("gptq", of_dtype("scales", torch.int32), "up_proj.scales is I32"),
        ("gptq by order", gone("g_idx"), r"order of activations \(desc_act\), and has no g_idx"),
        (
            "gptq 3 bits",
            cut("qweight", 8),
            "qweight .I32 .8, 64.. is no matrix of numbers of 3 bits",
        ),
        ("awq", cut("scales", 5), r"up_proj.scales is F16 \[5, 64\]"),
        ("awq", cut("qweight", 95), "has 95 inputs, which are no groups of 16"),
        ("awq", cut("qzeros", 6, 7), r"up_proj.qzeros is I32 \[6, 7\]"),
        # Tensors that nobody knows are never taken for weights, nor left out.
        ("gptq", beside("a.weight", INT8), r"a.weight \(I8 \[4, 4\]\) belongs to no weight"),
        ("int4", beside("a.pre_quant", INT8), r"a.pre_quant \(I8 \[4, 4\]\) belongs to no weight"),
        ("modelopt", beside(f"{STEM}pre_quant_scale", torch.ones(96)), "pre_quant_scale .F32 .96"),
        (
            "fp8",
            beside("a.weight_scale_inv", torch.ones(1, 1)),
            "a.weight_scale_inv .F32 .1, 1.. b",
        ),
        ("gptq", beside(f"{STEM}weight", torch.ones(64, 96)), "up_proj.weight is stored twice, "),
    ],
)
def test_what_is_not_whole(
    kind: str, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    tensors = stored(kind)
    change(tensors)
    with pytest.raises(ReapError, match=message) as told:
        packing(KINDS[kind].config, entries_of(tensors), tensors)
    assert "\n" not in str(told.value)


def test_blocks_of_gpt_oss() -> None:
    config = KINDS["mxfp4"].config
    tensors = stored("mxfp4")
    name = "model.layers.0.mlp.experts.down_proj_scales"
    for cut_short in (tensors[name][:, :60], tensors[name][..., :2]):
        with pytest.raises(ReapError, match=f"{name} is U8 .*: beside .*_blocks, U8 .3, 64, 3, 16"):
            packing(config, entries_of({**tensors, name: cut_short}))
    alone = {name: tensors[name]}
    with pytest.raises(ReapError, match=f"{name} .* belongs to no weight that mxfp4 has"):
        packing(config, entries_of(alone))
    wide = {"x_blocks": torch.zeros(1, 2, 3, 8, dtype=torch.uint8), "x_scales": alone[name]}
    with pytest.raises(ReapError, match="x_blocks .* is no .experts, outputs, groups, 16 bytes"):
        packing(config, entries_of(wide))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("fp8", {"weight_block_size": [128]}, r"fp8 has weight_block_size \[128\]"),
        ("gptq", {"bits": 5}, "gptq has bits 5: it must be one of 2, 3, 4, 8"),
        ("gptq", {"bits": None}, "gptq has bits None"),
        ("gptq", {"group_size": "16"}, "gptq has group_size '16': it must be a number"),
        ("gptq", {"checkpoint_format": "marlin"}, "'marlin' is not read here, .*gptqmodel"),
        ("gptq", {"pack_dtype": "int16"}, "in 32-bit words"),
        ("gptq", {"bits": 8}, "qzeros is I32|scales is"),
        ("gptq", {"group_size": 32}, "scales is"),
        ("gptq", {"dynamic": {r"-:.*up_proj": {}}}, "is packed, and .* says that it is not"),
        ("awq", {"version": "gemv"}, "layout 'gemv' is not read here, .*pip install autoawq"),
        ("awq", {"bits": 8}, "awq has bits 8: it must be one of 4"),
        ("awq", {"group_size": 64}, "which are no groups of 64"),
        ("modelopt", {"quant_algo": "NVFP4_AWQ"}, "NVFP4_AWQ is not read here, .*nvidia-modelopt"),
        ("modelopt", {"quant_algo": None}, "None is not read here"),
        ("modelopt", {"quantized_layers": {"a": {"quant_algo": "W8A16"}}}, "W8A16 is not read"),
    ],
)
def test_configurations_that_are_not_read(kind: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ReapError, match=message) as told:
        packing({**KINDS[kind].config, **change}, entries_of(stored(kind)))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("int4", bits_of_weights(num_bits=9), "num_bits 9 and group_size 16 .group_0.: .*pip inst"),
        (
            "int4",
            bits_of_weights(num_bits=8),
            "weight_packed .* does not hold 96 numbers of 8 bits",
        ),
        ("int4", bits_of_weights(group_size=8), "does not hold 48 numbers"),
        ("int4", bits_of_weights(symmetric=False), "has no zero points, .* symmetric False"),
        ("int4 asymmetric", bits_of_weights(symmetric=True), "has zero points, .* symmetric True"),
        ("int4", bits_of_weights(strategy="token"), "the strategy 'token'"),
        (
            "int4",
            bits_of_weights(type="float"),
            r"weight_packed .* is not what pack-quantized float",
        ),
        ("nvfp4", bits_of_weights(num_bits=8), "weight_packed .* is not what nvfp4-pack-quantized"),
        ("w8a8", bits_of_weights(type="float"), "weight .I8 .* is not what int-quantized float8"),
        ("int4", lambda config: config.update(format="marlin-24"), "the format 'marlin-24'"),
        ("int4", lambda config: config.update(config_groups={}), "no config_groups"),
        (
            "int4",
            lambda config: config.update(sparsity_config={"format": "sparse-24-bitmask"}),
            "the sparsity format 'sparse-24-bitmask'",
        ),
        (
            "int4",
            lambda config: config.update(transform_config={"config_groups": {"R1": {}}}),
            "a transform_config, with rotations",
        ),
        (
            "int4",
            lambda config: config["config_groups"]["group_0"].update(targets=["re:.*q_proj"]),
            "up_proj.weight_packed .* no group of the configuration names it",
        ),
    ],
)
def test_compressions_that_are_not_read(
    kind: str, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    config = json.loads(json.dumps(KINDS[kind].config))
    change(config)
    with pytest.raises(ReapError, match=message) as told:
        packing(config, entries_of(stored(kind)))
    assert "\n" not in str(told.value)


def test_modules_that_are_not_packed_need_no_list() -> None:
    """Whether they are listed or not, and whatever is listed: what is stored counts."""
    plain = {"lm_head.weight": ("BF16", (8, 8)), "model.norm.weight": ("F32", (8,))}
    for kind in ("fp8", "int4", "gptq", "awq", "modelopt"):
        entries = {**entries_of(stored(kind)), **plain}
        for key in ("modules_to_not_convert", "ignore"):
            for listed in (None, [], ["lm_head", "model.norm"], [STEM.rstrip(".")]):
                found = packing({**KINDS[kind].config, key: listed}, entries)
                assert set(found.plain) == set(plain) and list(found.weights) == [f"{STEM}weight"]


def test_scales_of_activations_are_left_out() -> None:
    idle = {
        "fp8": ("activation_scale", "input_scale"),
        "int4": ("input_scale", "input_zero_point", "output_scale"),
        "nvfp4": ("input_global_scale",),
        "modelopt": ("input_scale",),
    }
    for kind, names in idle.items():
        entries = entries_of(stored(kind))
        entries |= {STEM + name: ("F32", (1,)) for name in names}
        entries |= {"model.layers.0.self_attn.k_scale": ("F32", ())}
        found = packing(KINDS[kind].config, entries)
        assert found.plain == () and len(found.weights) == 1


def test_modules_of_their_own_bits() -> None:
    """`dynamic` of GPTQModel; groups of compressed-tensors, by name, pattern and class."""
    config = {**KINDS["gptq"].config, "checkpoint_format": "gptq_v2"}
    config["dynamic"] = {r"+:.*experts\.0\.up_proj": {"bits": 8, "group_size": 96}}
    eight, _ = KINDS["gptq 8 bits"].pack(torch.randn(64, 96))
    other = "model.layers.0.mlp.experts.1.up_proj."
    entries = entries_of({STEM + name: x for name, x in eight.items()})
    four, _ = KINDS["gptq v2"].pack(torch.randn(64, 96))
    entries |= entries_of({other + name: x for name, x in four.items()})
    found = packing(config, entries)
    assert {one.shape for one in found.weights.values()} == {(64, 96)}

    groups = {
        "by class": KINDS["int4"].config["config_groups"]["group_0"],
        "by pattern": dict(KINDS["int4 by order"].config["config_groups"]["group_0"]),
        "by name": dict(KINDS["int8 by channel"].config["config_groups"]["group_0"]),
    }
    groups["by pattern"]["targets"] = [r"re:.*experts\.1\.up_proj$"]
    groups["by name"]["targets"] = [STEM.rstrip(".")]
    config = {**KINDS["int4"].config, "config_groups": groups}
    entries = {}
    for number, kind in enumerate(("int8 by channel", "int4 by order", "int4")):
        parts, _ = KINDS[kind].pack(torch.randn(64, 96))
        stem = STEM.replace("experts.0", f"experts.{number}")
        entries |= entries_of({stem + name: x for name, x in parts.items()})
    found = packing(config, entries)
    assert {one.shape for one in found.weights.values()} == {(64, 96)}
    assert found.said.count(" and ") == 2


def test_a_row_that_ends_within_a_word() -> None:
    """Only the shape beside it says how long it is; without, a whole word is taken."""
    parts, _ = KINDS["int8 by channel"].pack(torch.randn(32, 90))
    entries = entries_of({STEM + name: x for name, x in parts.items()})
    settings = formats.settings_of({"quantization_config": KINDS["int8 by channel"].config})
    assert settings is not None
    form = formats.format_of(settings)
    assert form is not None
    (known,) = unpacking(form, entries, lambda name: [32, 90]).weights.values()
    (guessed,) = unpacking(form, entries).weights.values()
    assert known.shape == (32, 90) and guessed.shape == (32, 92)


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, "nvfp4 of ModelOpt"),
        ("quantize_config.json", {"bits": 4, "group_size": 128}, "gptq, 4 bits in groups of 128"),
        (
            "quant_config.json",
            {"w_bit": 4, "q_group_size": 64, "version": "GEMM"},
            "awq, 4 bits in groups of 64",
        ),
    ],
)
def test_files_beside_the_configuration(
    tmp_path: Path, name: str, fields: dict[str, Any], said: str
) -> None:
    """Where config.json says nothing."""
    (tmp_path / name).write_text(json.dumps(fields))
    found = formats.settings_of({"model_type": "any"}, tmp_path)
    assert found is not None
    form = formats.format_of(found)
    assert form is not None and form.said == said
    told = formats.settings_of({"quantization_config": {"quant_method": "fp8"}}, tmp_path)
    assert told == {"quant_method": "fp8"}
    assert formats.settings_of({"model_type": "any"}) is None


def test_where_a_configuration_says_it() -> None:
    fp8 = {"quant_method": "fp8"}
    assert formats.settings_of({"text_config": {"quantization_config": fp8}}) == fp8
    old = formats.settings_of({"compression_config": {"format": "dense"}})
    assert old == {"format": "dense", "quant_method": "compressed-tensors"}
    four = formats.settings_of({"quantization_config": {"load_in_4bit": True}})
    assert four is not None and formats.format_of(four) is None
    assert formats.package_of(four) == "bitsandbytes"
    assert formats.package_of({"quant_method": "fbgemm-fp8"}) == "fbgemm-gpu"
    assert formats.package_of({"quant_method": "new"}) == "new"
