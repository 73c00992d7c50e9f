"""The formats of quantised checkpoints that are read here, exactly and without their own packages:
what a configuration says of one, as rows of `reap.model.packed`.

The values are those of the formats' own libraries, bit for bit: compressed-tensors 0.20, gptqmodel
7.7, AutoAWQ 0.2.9, ModelOpt 0.47, and of transformers 5.24 for FP8 and MXFP4.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from reap.errors import ReapError
from reap.files.safefile import read_json
from reap.model import decoding
from reap.model.compressed import compressed
from reap.model.packed import Format, Found, Made, Row, blocks

FLOATS = ("F8_E4M3", "F8_E5M2")
SCALES = ("F32", "BF16", "F16")
SMALL = ("BF16", "F16")  # of scales that integers are multiplied with in their own precision
# Scales of activations and of caches of keys and values.
IDLE = (".input_scale", ".output_scale", ".activation_scale", ".k_scale", ".q_scale", ".v_scale")

# Where a config.json says nothing, a file beside it may: its name -> whose it is.
SIDE_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq"} | {
    "quant_config.json": "awq"
}
# Formats that are not read here -> the package that reads them.
PACKAGES = {
    "aqlm": "aqlm", "auto-round": "auto-round", "bitnet": "bitnet", "bitsandbytes": "bitsandbytes",
    "eetq": "eetq", "fbgemm_fp8": "fbgemm-gpu", "fp_quant": "fp_quant", "higgs": "flute-kernel",
    "hqq": "hqq", "quanto": "optimum-quanto", "quark": "amd-quark", "spqr": "spqr_quant",
    "torchao": "torchao", "vptq": "vptq",
}  # fmt: skip


def settings_of(config: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any] | None:
    """What config.json, or a quantiser's file in `folder`, says of how weights are packed, with its
    `quant_method`; None for a checkpoint that is not quantised."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            found = place.get(key)
            if isinstance(found, Mapping) and found:
                usual = "compressed-tensors" if key == "compression_config" else None
                return _with_method(dict(found), usual)
    for name, method in SIDE_FILES.items() if folder is not None else ():
        if folder is not None and (folder / name).is_file():
            found = read_json(folder / name, limit=64 << 20)
            return _with_method(found, method)
    return None


def _with_method(settings: dict[str, Any], usual: str | None) -> dict[str, Any]:
    inner = settings.get("quantization")
    if isinstance(inner, Mapping):  # ModelOpt's own file
        settings = {**settings, **inner}
    method = settings.get("quant_method") or usual
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        method = "bitsandbytes"
    return {**settings, "quant_method": str(method).replace("_", "-") if method else None}


def format_of(settings: Mapping[str, Any]) -> Format | None:
    """The format that these settings speak of; None for one that is not read here. ReapError for a
    variant of one that is."""
    method = settings["quant_method"]
    if isinstance(method, str) and method.startswith("modelopt"):
        method = "modelopt"
    reader = READERS.get(str(method))
    return None if reader is None else reader(settings)


def package_of(settings: Mapping[str, Any]) -> str:
    method = str(settings["quant_method"])
    return PACKAGES.get(method) or PACKAGES.get(method.replace("-", "_")) or method


def number(settings: Mapping[str, Any], *keys: str, of: tuple[int, ...] = ()) -> int:
    """The first of these settings that there is. ReapError when it is no number, or none `of`."""
    key = next((key for key in keys if settings.get(key) is not None), keys[0])
    value = settings.get(key)
    if type(value) is not int or (of and value not in of):
        wanted = f"one of {', '.join(map(str, of))}" if of else "a number"
        raise ReapError(
            f"the configuration of {settings['quant_method']} has {key} {value!r}: it must be "
            f"{wanted} to be read"
        )
    return value


def _float8(settings: Mapping[str, Any]) -> Format:
    """DeepSeek's, and what transformers writes: FP8 with scales of blocks, or of rows, or one; some
    experts in FP4; MXFP8, whose scales are exponents."""
    size = settings.get("weight_block_size")
    good = isinstance(size, list | tuple) and len(size) == 2
    if size is not None and not (good and all(type(x) is int and x > 0 for x in size)):
        raise ReapError(
            f"the configuration of fp8 has weight_block_size {size!r}: it must be two sizes"
        )
    block = (int(size[0]), int(size[1])) if size else None
    endings = {"scale": ("weight_scale_inv", "scale", "qscale_weight", "weight_scale")}
    fused = {"scale": ("_scale_inv", "_scale")}
    make = partial(_floats, stated=block)
    said = str(settings["quant_method"])
    said += f" in blocks of {block[0]} x {block[1]}" if block else ""
    return Format(
        said,
        (
            Row(".weight", ".weight", (*FLOATS, "I8"), _dotted(endings), make),
            Row("", "", FLOATS, fused, make),
        ),
        (*IDLE, "_activation_scale", ".qscale_act"),
        ("_scale_inv",),
    )


def _floats(found: Found, stated: tuple[int, int] | None) -> Made:
    shape = found.shape()
    if found.dtype() in ("I8", "U8"):
        shape = (*shape[:-1], 2 * shape[-1])
    if found.dtype("scale") not in (*SCALES, "U8", "F8_E8M0"):
        raise found.error(f"has scales of {found.dtype('scale')}, which are not known")
    matrix = shape if len(shape) > 1 else (1, *shape)
    block = blocks(found, matrix, stated)
    return "F32", shape, partial(decoding.floats, block=block)


def _mxfp4(settings: Mapping[str, Any]) -> Format:
    def make(found: Found) -> Made:
        shape = found.shape()
        if len(shape) != 4 or shape[3] != 16:
            raise found.error("is no [experts, outputs, groups, 16 bytes]")
        found.expect("scale", shape[:3], dtypes=("U8",))
        made = (shape[0], 32 * shape[2], shape[1])
        return "BF16", made, decoding.microscaled_blocks

    return Format(
        "mxfp4", (Row("_blocks", "", ("U8",), {"scale": ("_scales",)}, make),), (), ("_scales",)
    )


def _modelopt(settings: Mapping[str, Any]) -> Format:
    layers = settings.get("quantized_layers")
    algorithms = {str(settings.get("quant_algo"))}
    if isinstance(layers, Mapping):
        algorithms = {str(one.get("quant_algo")) for one in layers.values()}
    known = {"NVFP4", "W4A16_NVFP4", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8"}
    if algorithms - known:
        raise ReapError(
            f"ModelOpt's {min(algorithms - known)} is not read here, but {', '.join(sorted(known))}"
            ": give a checkpoint that nvidia-modelopt (pip install nvidia-modelopt) saved "
            "unquantised"
        )

    def nvfp4(found: Found) -> Made:
        shape = found.shape()
        made = (*shape[:-1], 2 * shape[-1])
        if len(shape) != 2 or made[1] % 16:
            raise found.error("is no matrix of bytes in groups of 8")
        found.expect("scale", (made[0], made[1] // 16), dtypes=("F8_E4M3",))
        found.expect("whole", (), (1,), dtypes=("F32",))
        return "F32", made, partial(decoding.two_scales, inverse=False)

    parts = {"scale": ("weight_scale",), "whole": ("weight_scale_2",)}
    return Format(
        f"{' and '.join(sorted(algorithms)).lower()} of ModelOpt",
        (
            Row(".weight", ".weight", ("U8",), _dotted(parts), nvfp4),
            Row(".weight", ".weight", FLOATS, _dotted({"scale": ("weight_scale",)}),
                partial(_floats, stated=None)),
        ),
        IDLE,
        (".weight_scale", ".weight_scale_2", ".pre_quant_scale"),
    )  # fmt: skip


def _gptq(settings: Mapping[str, Any]) -> Format:
    """Bits and groups may be others for some modules (`dynamic`, of GPTQModel)."""
    version = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if version not in ("gptq", "gptq_v2") or settings.get("pack_dtype") not in (None, "int32"):
        raise ReapError(
            f"GPTQ's format {version!r} is not read here, but gptq and gptq_v2 in 32-bit words: "
            "save it so with gptqmodel (pip install gptqmodel)"
        )
    above = int(version == "gptq")
    bits = number(settings, "bits", "w_bit", of=(2, 3, 4, 8))
    group = number(settings, "group_size", "q_group_size")
    dynamic = settings.get("dynamic") or {}

    def make(found: Found) -> Made:
        own = _dynamic(dynamic, found, {**settings, "bits": bits, "group_size": group})
        bits_of = number(own, "bits", of=(2, 3, 4, 8))
        words, rows = found.shape() if len(found.shape()) == 2 else (0, 0)
        columns = words * 32 // bits_of
        if not columns or words * 32 % bits_of:
            raise found.error(f"is no matrix of numbers of {bits_of} bits")
        size = number(own, "group_size")
        size = columns if size <= 0 else size
        groups = -(-columns // size)
        found.expect("scale", (groups, rows), dtypes=SMALL)
        found.expect("zero", (groups, -(-rows * bits_of // 32)), dtypes=("I32",))
        if "groups" in found.parts:
            found.expect("groups", (columns,), dtypes=("I32",))
        elif own.get("desc_act") and groups > 1:
            raise found.error("is in the order of activations (desc_act), and has no g_idx")
        decode = partial(decoding.packed_columns, bits=bits_of, group=size, above=above)
        return found.dtype("scale"), (rows, columns), decode

    said = f"gptq, {bits} bits" + (f" in groups of {group}" if group > 0 else "")
    parts = {"scale": ("scales",), "zero": ("qzeros",), "groups?": ("g_idx",)}
    row = Row(".qweight", ".weight", ("I32",), _dotted(parts), make)
    return Format(said, (row,), (), (".qweight", ".qzeros", ".scales", ".g_idx"))


def _dynamic(
    dynamic: Mapping[str, Any], found: Found, settings: Mapping[str, Any]
) -> Mapping[str, Any]:
    for pattern, own in dynamic.items():
        if re.match(re.sub(r"^[+-]:", "", pattern), found.module):
            if pattern.startswith("-:"):
                raise found.error(f"is packed, and {pattern!r} of dynamic says that it is not")
            return {**settings, **own}
    return settings


def _awq(settings: Mapping[str, Any]) -> Format:
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if version != "gemm":
        raise ReapError(
            f"AWQ's layout {version!r} is not read here, but gemm: save it so with autoawq "
            "(pip install autoawq)"
        )
    number(settings, "bits", "w_bit", of=(4,))
    group = number(settings, "group_size", "q_group_size")

    def make(found: Found) -> Made:
        shape = found.shape()
        if len(shape) != 2:
            raise found.error("is no matrix")
        columns, rows = shape[0], 8 * shape[1]
        size = columns if group <= 0 else group
        if columns % size:
            raise found.error(f"has {columns} inputs, which are no groups of {size}")
        found.expect("scale", (columns // size, rows), dtypes=SMALL)
        found.expect("zero", (columns // size, shape[1]), dtypes=("I32",))
        decode = partial(decoding.packed_interleaved, group=size)
        return found.dtype("scale"), (rows, columns), decode

    parts = {"scale": ("scales",), "zero": ("qzeros",)}
    row = Row(".qweight", ".weight", ("I32",), _dotted(parts), make)
    said = "awq, 4 bits" + (f" in groups of {group}" if group > 0 else "")
    return Format(said, (row,), (), (".qweight", ".qzeros", ".scales"))


def _dotted(parts: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Beside a name without its own last part."""
    return {part: tuple(f".{name}" for name in names) for part, names in parts.items()}


READERS: dict[str, Callable[[Mapping[str, Any]], Format]] = {
    "fp8": _float8,
    "mxfp8": _float8,
    "mxfp4": _mxfp4,
    "compressed-tensors": compressed,
    "modelopt": _modelopt,
    "gptq": _gptq,
    "awq": _awq,
}
