"""Quantised checkpoints, packed as their formats' descriptions say, and the same weights by hand.

    packed(tmp_path, "gptq")     # writes tmp_path/packed, and tmp_path/plain with what it holds

A packer gives the tensors that stand for a weight, and the weight, computed element by element from
the numbers before they are packed. Compared once with what the formats' own libraries make of these
tensors (`test_decoding.py` does so where they are installed).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from folders import saved, tensors_of
from safetensors.torch import save_file
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of AutoAWQ's packer: the column in each nibble of a word
Packed = tuple[dict[str, Tensor], Tensor]  # ending of a name -> tensor; the weight


def words(values: Tensor, bits: int) -> Tensor:
    """[n, k] non-negative -> [n, ceil(k*bits/32)] int32, bit by bit."""
    array = values.numpy().astype(np.uint8)
    single = np.unpackbits(array[..., None], axis=-1, bitorder="little")[..., :bits]
    row = single.reshape(len(array), -1)
    row = np.pad(row, ((0, 0), (0, -row.shape[1] % 32)))
    return torch.from_numpy(np.packbits(row, axis=-1, bitorder="little").view(np.int32).copy())


def nibbles(codes: Tensor) -> Tensor:
    """[..., k] codes of FP4 -> [..., k/2] bytes."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)


def fp4(codes: Tensor) -> Tensor:
    sign = 1.0 - 2.0 * (codes >> 3).float()
    return torch.tensor(E2M1)[(codes & 7).long()] * sign


def per_element(grid: Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    rows = torch.arange(shape[0]) // block[0]
    return grid[rows][:, torch.arange(shape[1]) // block[1]]


def codes_of(shape: tuple[int, ...], bits: int) -> Tensor:
    return torch.randint(0, 1 << bits, shape, dtype=torch.int32)


def scales_of(weight: Tensor, shape: tuple[int, ...], top: float) -> Tensor:
    """Of about the weight's size, all different."""
    return (0.5 + torch.rand(shape)) * float(weight.float().std()) * 2 / top


def float8(
    weight: Tensor, block: tuple[int, int] | None, ending: str = "weight_scale_inv"
) -> Packed:
    n, k = weight.shape
    rows, columns = block or (n, k)
    grid = (-(-n // rows), -(-k // columns))
    scale = scales_of(weight, grid, 16)
    stored = (weight.float() / per_element(scale, (rows, columns), (n, k))).to(torch.float8_e4m3fn)
    truth = stored.float() * per_element(scale, (rows, columns), (n, k))
    return {"weight": stored, ending: scale if block else scale.reshape(())}, truth


def exponents8(weight: Tensor) -> Packed:
    n, k = weight.shape
    exponent = torch.randint(117, 121, (n, k // 32), dtype=torch.uint8)
    stored = (weight.float() * 64).to(torch.float8_e4m3fn)
    factor = 2.0 ** (exponent.float() - 127)
    truth = stored.float() * per_element(factor, (1, 32), (n, k))
    return {"weight": stored, "weight_scale_inv": exponent}, truth


def integers(
    weight: Tensor, bits: int, group: int, *, symmetric: bool = True, shuffled: bool = False
) -> Packed:
    """compressed-tensors, pack-quantized."""
    n, k = weight.shape
    group = group or k
    codes, half = codes_of((n, k), bits), 1 << bits - 1
    scale = scales_of(weight, (n, k // group), half).bfloat16()
    zero = torch.full(scale.shape, half, dtype=torch.int32)
    order = torch.arange(k) // group
    found = {"weight_packed": words(codes, bits), "weight_scale": scale}
    found["weight_shape"] = torch.tensor([n, k])
    if not symmetric:
        zero = codes_of((n, k // group), bits)
        found["weight_zero_point"] = words(zero.t().contiguous(), bits).t().contiguous()
    if shuffled:
        order = order[torch.randperm(k)]
        found["weight_g_idx"] = order.int()
    truth = (codes - zero[:, order]).bfloat16() * scale[:, order]
    return found, truth


def plain_float8(weight: Tensor, block: tuple[int, int]) -> Packed:
    """compressed-tensors, float-quantized: the scale is of 16 bits, and so is the product."""
    tensors, _ = float8(weight, block, "weight_scale")
    scale = tensors["weight_scale"] = tensors["weight_scale"].bfloat16()
    return tensors, tensors["weight"].bfloat16() * per_element(scale, block, tuple(weight.shape))


def plain_int8(weight: Tensor, *, symmetric: bool = True) -> Packed:
    n, k = weight.shape
    stored = codes_of((n, k), 8).sub(128).to(torch.int8)
    scale = scales_of(weight, (n, 1), 128).bfloat16()
    found = {"weight": stored, "weight_scale": scale}
    values = stored.bfloat16()
    if not symmetric:
        zero = found["weight_zero_point"] = codes_of((n, 1), 8).sub(128).to(torch.int8)
        values = values - zero.bfloat16()
    return found, values * scale


def halves_of(weight: Tensor, *, library: str) -> Packed:
    """NVFP4, and MXFP4 of compressed-tensors."""
    n, k = weight.shape
    codes = codes_of((n, k), 4)
    size = 32 if library == "mx" else 16
    if library == "mx":
        exponent = torch.randint(119, 123, (n, k // 32), dtype=torch.uint8)
        truth = fp4(codes) * per_element(2.0 ** (exponent.float() - 127), (1, 32), (n, k))
        return {"weight_packed": nibbles(codes), "weight_scale": exponent}, truth.bfloat16()
    scale = (torch.rand(n, k // size) * 100 + 1).to(torch.float8_e4m3fn)
    whole = scales_of(weight, (1,), 600)
    if library == "modelopt":
        both = scale.float() * whole
        parts = {"weight": nibbles(codes), "weight_scale": scale, "weight_scale_2": whole[0]}
        parts["input_scale"] = torch.tensor(0.5)
        return parts, fp4(codes) * per_element(both, (1, size), (n, k))
    inverse = 1 / whole
    both = scale.float() / inverse
    truth = (fp4(codes) * per_element(both, (1, size), (n, k))).bfloat16()
    parts = {"weight_packed": nibbles(codes), "weight_scale": scale}
    return parts | {"weight_global_scale": inverse}, truth


def gptq(
    weight: Tensor, bits: int, group: int, *, version: int = 1, shuffled: bool = False
) -> Packed:
    n, k = weight.shape
    group = group if group > 0 else k
    count = k // group
    codes = codes_of((n, k), bits)
    scale = scales_of(weight, (n, count), 1 << bits - 1).half()
    zero = codes_of((n, count), bits)
    zero = zero.clamp(min=1) if version == 1 else zero
    order = torch.arange(k) // group
    if shuffled:
        order = order[torch.randperm(k)]
    found = {
        "qweight": words(codes, bits).t().contiguous(),
        "qzeros": words((zero - int(version == 1)).t().contiguous(), bits),
        "scales": scale.t().contiguous(),
        "g_idx": order.int(),
    }
    return found, scale[:, order] * (codes - zero[:, order])


def awq(weight: Tensor, group: int) -> Packed:
    n, k = weight.shape
    codes, zero = codes_of((n, k), 4), codes_of((n, k // group), 4)
    scale = scales_of(weight, (n, k // group), 8).half()

    def packed(values: Tensor) -> Tensor:  # [n, any] -> [any, n/8]
        ordered = values.t().reshape(values.shape[1], n // 8, 8)[..., AWQ_ORDER]
        return words(ordered.reshape(values.shape[1], n), 4)

    found = {"qweight": packed(codes), "qzeros": packed(zero), "scales": scale.t().contiguous()}
    order = torch.arange(k) // group
    return found, (codes - zero[:, order]) * scale[:, order]


def gpt_oss(weight: Tensor) -> Packed:
    """[E, K, N], as the model has it."""
    experts, k, n = weight.shape
    codes = codes_of((experts, n, k), 4)
    exponent = torch.randint(118, 123, (experts, n, k // 32), dtype=torch.uint8)
    factor = (2.0 ** (exponent.float() - 127)).repeat_interleave(32, dim=-1)
    blocks = nibbles(codes).view(experts, n, k // 32, 16)
    truth = (fp4(codes) * factor).transpose(1, 2).bfloat16().contiguous()
    return {"_blocks": blocks, "_scales": exponent}, truth


def ct(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


INT = {"type": "int", "strategy": "group"}
FLOAT = {"type": "float", "num_bits": 8}
NVFP4 = {"type": "float", "num_bits": 4, "strategy": "tensor_group", "group_size": 16}
MXFP4 = {"type": "float", "num_bits": 4, "strategy": "group", "group_size": 32}
GPTQ = {"quant_method": "gptq", "group_size": 16, "desc_act": False, "sym": False}


@dataclass(frozen=True)
class Kind:
    """What `quantization_config` says, how a weight is packed, and how the format is called."""

    config: Mapping[str, Any]
    pack: Callable[[Tensor], Packed]
    said: str
    model_type: str = "qwen3_moe"
    side: str | None = None  # a file that has the configuration, in place of config.json
    options: Mapping[str, Any] = field(default_factory=dict)


def _fp8(block: tuple[int, int] | None) -> Kind:
    said = f"fp8 in blocks of {block[0]} x {block[1]}" if block else "fp8"
    size = list(block) if block else None
    return Kind(
        {"quant_method": "fp8", "weight_block_size": size}, partial(float8, block=block), said
    )


def _gptq(bits: int, version: int = 1, *, group: int = 16, shuffled: bool = False) -> Kind:
    config = {**GPTQ, "bits": bits, "group_size": group, "desc_act": shuffled}
    config["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    make = partial(gptq, bits=bits, group=group, version=version, shuffled=shuffled)
    return Kind(
        config, make, f"gptq, {bits} bits" + (f" in groups of {group}" if group > 0 else "")
    )


def _ct(said: str, config: dict[str, Any], pack: Callable[[Tensor], Packed]) -> Kind:
    return Kind(config, pack, f"compressed-tensors {said}")


KINDS: dict[str, Kind] = {
    "fp8": _fp8((16, 16)),
    "fp8 with cut blocks": _fp8((24, 20)),
    "fp8 of one scale": _fp8(None),
    "mxfp8": Kind(
        {"quant_method": "mxfp8", "weight_block_size": [1, 32]}, exponents8,
        "mxfp8 in blocks of 1 x 32",
    ),
    "mxfp4": Kind({"quant_method": "mxfp4"}, gpt_oss, "mxfp4", "gpt_oss"),
    "int4": _ct(
        "pack-quantized int4 in groups of 16",
        ct("pack-quantized", num_bits=4, group_size=16, **INT),
        partial(integers, bits=4, group=16),
    ),
    "int4 asymmetric": _ct(
        "pack-quantized int4 in groups of 16, asymmetric",
        ct("pack-quantized", num_bits=4, group_size=16, **{**INT, "symmetric": False}),
        partial(integers, bits=4, group=16, symmetric=False),
    ),
    "int4 by order": _ct(
        "pack-quantized int4 in groups of 8",
        ct("pack-quantized", num_bits=4, group_size=8, actorder="group", **INT),
        partial(integers, bits=4, group=8, shuffled=True),
    ),
    "int8 by channel": _ct(
        "pack-quantized int8 by channel",
        ct("pack-quantized", num_bits=8, **{**INT, "strategy": "channel"}),
        partial(integers, bits=8, group=0),
    ),
    "int3": _ct(
        "pack-quantized int3 in groups of 16, asymmetric",
        ct("pack-quantized", num_bits=3, group_size=16, **{**INT, "symmetric": False}),
        partial(integers, bits=3, group=16, symmetric=False),
    ),
    "float8 by channel": _ct(
        "float-quantized float8 by channel",
        ct("float-quantized", strategy="channel", **FLOAT),
        lambda weight: plain_float8(weight, (1, weight.shape[1])),
    ),
    "float8 in blocks": _ct(
        "float-quantized float8 in blocks of 12 x 16",
        ct("float-quantized", strategy="block", block_structure=[12, 16], **FLOAT),
        lambda weight: plain_float8(weight, (12, 16)),
    ),
    "w8a8": _ct(
        "int-quantized int8 by channel",
        ct("int-quantized", num_bits=8, type="int", strategy="channel"),
        plain_int8,
    ),
    "w8a8 asymmetric": _ct(
        "int-quantized int8 by channel, asymmetric",
        ct("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False),
        partial(plain_int8, symmetric=False),
    ),
    "nvfp4": _ct(
        "nvfp4-pack-quantized float4 in groups of 16",
        ct("nvfp4-pack-quantized", **NVFP4),
        partial(halves_of, library="ct"),
    ),
    "mxfp4 packed": _ct(
        "mxfp4-pack-quantized float4 in groups of 32",
        ct("mxfp4-pack-quantized", **MXFP4),
        partial(halves_of, library="mx"),
    ),
    "modelopt": Kind(
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
        partial(halves_of, library="modelopt"),
        "nvfp4 of ModelOpt",
    ),
    "modelopt fp8": Kind(
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}},
        partial(float8, block=None, ending="weight_scale"),
        "fp8 of ModelOpt",
        side="hf_quant_config.json",
    ),
    "gptq": _gptq(4),
    "gptq v2": _gptq(4, 2),
    "gptq by order": _gptq(4, 2, shuffled=True),
    "gptq 8 bits": _gptq(8, 2, group=-1),
    "gptq 3 bits": _gptq(3),
    "gptq 2 bits": _gptq(2, 2),
    "awq": Kind(
        {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True},
        partial(awq, group=16),
        "awq, 4 bits in groups of 16",
    ),
}  # fmt: skip
SIZES = {
    "qwen3_moe": {"moe_intermediate_size": 32, "intermediate_size": 32, "num_hidden_layers": 2},
    "gpt_oss": {"intermediate_size": 32},
}
# Of the last layer attention is left as it is: a checkpoint of packed and of plain weights.
QUANTISED = {
    "qwen3_moe": r"(?!.*layers\.1\.self_attn).*_proj\.weight",
    "gpt_oss": r".*experts\.(gate_up|down)_proj",
}


def packed(
    folder: Path, name: str, *, save: Callable[[Path], object] | None = None, **options: Any
) -> tuple[Path, Path]:
    """The folders of a tiny model in a format, and of the same weights in 16 or 32 bits. `save`
    writes another model than usual."""
    kind = KINDS[name]
    plain, made = folder / "plain", folder / "packed"
    sizes = {**SIZES[kind.model_type], "dtype": torch.bfloat16}
    if save is None:
        saved(plain, kind.model_type, **sizes, **options)
    else:
        save(plain)
    torch.manual_seed(5)
    stored: dict[str, Tensor] = {}
    truths: dict[str, Tensor] = {}
    for tensor, weight in tensors_of(plain).items():
        if re.fullmatch(QUANTISED[kind.model_type], tensor):
            parts, truths[tensor] = kind.pack(weight)
            stem = tensor.removesuffix("weight")
            stored |= {f"{stem}{ending}": part.contiguous() for ending, part in parts.items()}
        else:
            stored[tensor] = truths[tensor] = weight
    assert stored.keys() != truths.keys()
    shutil.copytree(plain, made)
    save_file(truths, plain / "model.safetensors", {"format": "pt"})
    save_file(stored, made / "model.safetensors", {"format": "pt"})
    where = made / (kind.side or "config.json")
    if kind.side:
        where.write_text(json.dumps(dict(kind.config)))
    else:
        config = json.loads(where.read_text())
        where.write_text(json.dumps({**config, "quantization_config": dict(kind.config)}))
    return made, plain
