"""Packed weights become what their formats' descriptions, and their libraries, make of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from packers import E2M1, KINDS, Kind, codes_of, words
from torch import Tensor

from reap.errors import ReapError
from reap.model import decoding, formats
from reap.model.packed import Weight, unpacking
from reap.model.stored import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHAPES = [(64, 96), (72, 160)]
STEM = "model.layers.0.mlp.experts.0.up_proj."


def poisoned(*args: Any, **kwargs: Any) -> Tensor:
    made = torch.zeros(*args, **kwargs)
    return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(77)


@pytest.fixture(autouse=True)
def small_bands_of_poisoned_memory(monkeypatch: Any) -> None:
    monkeypatch.setattr(decoding, "BAND", 500)
    monkeypatch.setattr(decoding.torch, "empty", poisoned)


def made_of(kind: Kind, parts: Mapping[str, Tensor]) -> Weight:
    entries = {STEM + name: (NAMES[x.dtype], tuple(x.shape)) for name, x in parts.items()}
    config = {"quant_method": "modelopt", **kind.config}  # as the name of its file says
    settings = formats.settings_of({"quantization_config": config})
    assert settings is not None
    form = formats.format_of(settings)
    assert form is not None

    def peek(name: str) -> list[int]:
        return parts[name.removeprefix(STEM)].tolist()

    (weight,) = unpacking(form, entries, peek).weights.values()
    return weight


def decoded(kind: Kind, parts: Mapping[str, Tensor]) -> Tensor:
    weight = made_of(kind, parts)
    given = {part: parts[name.removeprefix(STEM)] for part, name in weight.parts.items()}
    made = weight.decode(given, weight.shape)
    assert made.dtype == DTYPES[weight.dtype] and made.shape == weight.shape
    return made


def assert_same(made: Tensor, truth: Tensor) -> None:
    assert made.dtype == truth.dtype and made.is_contiguous()
    assert torch.equal(made, truth)


def draw(kind: Kind, shape: tuple[int, int]) -> Tensor:
    torch.manual_seed(shape[0])
    fused = kind.model_type == "gpt_oss"
    return torch.randn(3, shape[1], shape[0]) if fused else torch.randn(shape) / 8


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_by_hand(name: str, shape: tuple[int, int]) -> None:
    parts, truth = KINDS[name].pack(draw(KINDS[name], shape))
    assert_same(decoded(KINDS[name], parts), truth)


COMPRESSED = [name for name, kind in KINDS.items() if "config_groups" in kind.config]
NOT_THEIRS = {"int4 by order"}  # which release 0.20 has given up


@pytest.mark.parametrize("name", sorted({*COMPRESSED} - NOT_THEIRS))
def test_as_compressed_tensors_does(name: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    kind = KINDS[name]
    config = QuantizationConfig.model_validate(dict(kind.config))
    (scheme,) = config.config_groups.values()
    parts, _ = kind.pack(draw(kind, (64, 96)))
    compressor = BaseCompressor.get_value_from_registry(kind.config["format"])
    theirs = compressor.decompress(dict(parts), scheme)["weight"]
    assert_same(decoded(kind, parts), theirs)


def test_awq_as_compressed_tensors_converts_it() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    kind = KINDS["awq"]
    parts, truth = kind.pack(draw(kind, (64, 96)))
    converter = AutoAWQConverter(group_size=16)
    theirs = converter.process({f"a.{name}": x for name, x in parts.items()})
    renamed = {name.removeprefix("a."): x for name, x in theirs.items()}
    asymmetric = KINDS["int4 asymmetric"]
    assert_same(decoded(asymmetric, renamed), decoded(kind, parts))
    assert_same(decoded(kind, parts), truth)


@pytest.mark.parametrize("block", [(16, 16), (24, 20)])
def test_fp8_as_compressed_tensors_dequantises_it(block: tuple[int, int]) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.entrypoints.convert.converters import FP8BlockDequantizer

    kind = KINDS["fp8" if block == (16, 16) else "fp8 with cut blocks"]
    parts, _ = kind.pack(draw(kind, (64, 96)))
    named = {f"a.{name}": x for name, x in parts.items()}
    for dtype in (torch.float32, torch.bfloat16):
        converter = FP8BlockDequantizer(weight_block_size=block, dtype=dtype)
        theirs = converter.process(dict(named))["a.weight"]
        assert_same(decoded(kind, parts).to(dtype), theirs.contiguous())


def test_mxfp4_as_transformers_does() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    kind = KINDS["mxfp4"]
    parts, _ = kind.pack(draw(kind, (64, 96)))
    made = decoding.microscaled_blocks(
        {"weight": parts["_blocks"], "scale": parts["_scales"]}, (3, 96, 64)
    )
    assert_same(made, convert_moe_packed_tensors(parts["_blocks"], parts["_scales"]))


def test_all_bytes_of_fp8() -> None:
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        values = every.view(dtype)
        assert torch.equal(decoding.eighths(values).nan_to_num(9e9), values.float().nan_to_num(9e9))
    finite = every[(every & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    assert torch.equal(decoding.eighths(finite).view(torch.int32), finite.float().view(torch.int32))


def test_all_bytes_of_fp4() -> None:
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    signed = [*E2M1, *(-x for x in E2M1)]
    expected = torch.tensor([[signed[i % 16], signed[i // 16]] for i in range(256)]).flatten()
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(decoding.halves(every, dtype), expected.to(dtype))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 10, 32, 75])
def test_integers_of_all_widths(bits: int, count: int) -> None:
    values = codes_of((3, count), bits)
    assert torch.equal(decoding.integers(words(values, bits), bits)[:, :count].int(), values)


def test_exponents() -> None:
    every = np.arange(255)
    bytes_ = torch.from_numpy(every.astype(np.uint8))
    expected = torch.from_numpy(np.ldexp(np.ones(255), every - 127))
    for scale in (bytes_, bytes_.view(torch.float8_e8m0fnu)):
        assert torch.equal(decoding.powers(scale).double(), expected)


def test_inputs_of_no_group() -> None:
    kind = KINDS["gptq by order"]
    parts, _ = kind.pack(draw(kind, (64, 96)))
    parts["g_idx"][7] = 6
    with pytest.raises(ReapError, match=r"groups 0 to 6 \(g_idx\), and scales of 6$"):
        decoded(kind, parts)
    parts["g_idx"][7] = -2
    with pytest.raises(ReapError, match="groups -2 to 5"):
        decoded(kind, parts)


def test_zero_points_on_which_programs_differ() -> None:
    """Stored less one, the highest number is a zero point of 16 to some and of 0 to others."""
    for name, high in (("gptq", 15), ("gptq 3 bits", 7)):
        kind = KINDS[name]
        parts, _ = kind.pack(draw(kind, (64, 96)))
        parts["qzeros"].fill_(-1)
        with pytest.raises(ReapError, match=f"zero points stored as {high}, .* 0 or {high + 1}"):
            decoded(kind, parts)
    kind = KINDS["gptq v2"]
    parts, _ = kind.pack(draw(kind, (64, 96)))
    parts["qzeros"].fill_(-1)
    assert torch.isfinite(decoded(kind, parts)).all()


def test_a_shape_that_is_stored_wrong() -> None:
    kind = KINDS["int4"]
    parts, _ = kind.pack(draw(kind, (64, 96)))
    parts["weight_shape"][1] = 95
    with pytest.raises(ReapError, match=r"\[64, 96\] by its other tensors, and \[64, 95\]"):
        decoded(kind, parts)


def test_groups_in_order_need_no_index() -> None:
    """And -1 stands for no order, as compressed-tensors had it."""
    kind = KINDS["int4"]
    parts, truth = kind.pack(draw(kind, (64, 96)))
    order = torch.arange(96, dtype=torch.int32) // 16
    for index in (order, torch.full((96,), -1, dtype=torch.int32)):
        assert_same(decoded(kind, {**parts, "weight_g_idx": index}), truth)


def test_experts_in_one_tensor() -> None:
    """FP8 of three experts at once is each of them, with scales of each or of all."""
    made = [KINDS["fp8"].pack(draw(KINDS["fp8"], (32, 64))) for _ in range(3)]
    weight = torch.stack([parts["weight"].view(torch.uint8) for parts, _ in made])
    scale = torch.stack([parts["weight_scale_inv"] for parts, _ in made])
    together = {"weight": weight.view(torch.float8_e4m3fn), "scale": scale}
    truth = torch.stack([one for _, one in made])
    assert_same(decoding.floats(together, (3, 32, 64), (16, 16)), truth)
    one = together | {"scale": torch.full((1,), 0.5)}
    expected = together["weight"].float() / 2
    assert_same(decoding.floats(one, (3, 32, 64), (32, 64)), expected)


def test_a_tensors_one_scale_serves_packed_rows() -> None:
    kind = KINDS["int8 by channel"]
    parts, _ = kind.pack(draw(kind, (64, 96)))
    alone = {**parts, "weight_scale": torch.tensor([0.25], dtype=torch.bfloat16)}
    every = {**parts, "weight_scale": torch.full((64, 1), 0.25, dtype=torch.bfloat16)}
    given = dict(kind.config)
    group = given["config_groups"]["group_0"]
    given["config_groups"] = {
        "group_0": {**group, "weights": {**group["weights"], "strategy": "tensor"}}
    }
    of_tensor = Kind(given, kind.pack, kind.said)
    assert_same(decoded(of_tensor, alone), decoded(kind, every))
