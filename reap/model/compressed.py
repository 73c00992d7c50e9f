"""compressed-tensors, a format of formats: groups of modules, each with its own scheme."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from reap.errors import ReapError
from reap.model import decoding
from reap.model.packed import Format, Found, Made, Row, blocks

SCALES = ("BF16", "F16", "F32")
INTEGERS, FP4, WIDE = "pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"
PLAIN = ("int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized")
FORMATS = (INTEGERS, FP4, WIDE, *PLAIN)
# Of activations; a global scale of weights has another name.
IDLE = (
    *(".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale"),
    *(".output_zero_point", ".output_global_scale"),
    *(f".{of}_{what}" for of in "kqv" for what in ("scale", "zero_point", "global_scale")),
)
STRAYS = (
    *(".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx"),
    ".weight_global_scale",
)


@dataclass(frozen=True)
class Scheme:
    """How the weights of the modules that `targets` name are stored."""

    targets: tuple[str, ...]
    form: str
    bits: int
    floating: bool
    strategy: str
    group: int  # 0: no groups
    symmetric: bool
    block: tuple[int, int] | None

    def __str__(self) -> str:
        kind = f"{'float' if self.floating else 'int'}{self.bits}"
        size = f" in groups of {self.group}" if self.group else f" by {self.strategy}"
        size = f" in blocks of {self.block[0]} x {self.block[1]}" if self.block else size
        return f"{self.form} {kind}{size}{'' if self.symmetric else ', asymmetric'}"


def compressed(settings: Mapping[str, Any]) -> Format:
    """ReapError for a compression that is more than rows of this table."""
    transforms = settings.get("transform_config") or {}
    if transforms.get("config_groups") if isinstance(transforms, Mapping) else transforms:
        raise _unread("a transform_config, with rotations that a model applies as it runs")
    sparsity = settings.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise _unread(f"the sparsity format {sparsity['format']!r}")
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _unread("no config_groups")
    schemes = [_scheme(settings, name, group) for name, group in groups.items()]
    known = tuple(scheme for scheme in schemes if scheme is not None)
    make = partial(_make, known)
    packed = {
        "scale": (".weight_scale",),
        "shape?": (".weight_shape",),
        "zero?": (".weight_zero_point",),
        "groups?": (".weight_g_idx",),
        "whole?": (".weight_global_scale",),
    }
    plain = {"scale": (".weight_scale",), "zero?": (".weight_zero_point",)}
    floats = ("F8_E4M3", "F8_E5M2", "I8")
    said = " and ".join(dict.fromkeys(map(str, known)))
    return Format(
        f"compressed-tensors {said}",
        (
            Row(".weight_packed", ".weight", ("I32", "U8"), packed, make),
            Row(".weight", ".weight", floats, plain, make),
        ),
        IDLE,
        STRAYS,
    )


def _unread(what: str) -> ReapError:
    return ReapError(
        f"the configuration of compressed-tensors has {what}: that is not read here: give a "
        "checkpoint that compressed-tensors (pip install compressed-tensors) decompressed"
    )


def _scheme(settings: Mapping[str, Any], name: str, group: Mapping[str, Any]) -> Scheme | None:
    weights = group.get("weights")
    if weights is None:  # only activations
        return None
    form = group.get("format") or settings.get("format")
    bits, floating = weights.get("num_bits"), weights.get("type") == "float"
    strategy = str(weights.get("strategy"))
    size, block = weights.get("group_size") or 0, weights.get("block_structure")
    if form not in FORMATS:
        raise _unread(f"the format {form!r} ({name})")
    if type(bits) is not int or not 1 <= bits <= 8 or type(size) is not int:
        raise _unread(f"num_bits {bits!r} and group_size {size!r} ({name})")
    good = block is None or (len(block) == 2 and all(type(x) is int and x > 0 for x in block))
    if not good or strategy not in ("tensor", "channel", "group", "block", "tensor_group"):
        raise _unread(f"the strategy {strategy!r} with block_structure {block!r} ({name})")
    return Scheme(
        tuple(map(str, group.get("targets") or ())),
        form,
        bits,
        floating,
        strategy,
        max(0, size) if "group" in strategy else 0,
        bool(weights.get("symmetric", True)),
        (block[0], block[1]) if block and strategy == "block" else None,
    )


def _of(module: str, schemes: Sequence[Scheme]) -> Scheme | None:
    """By exact name, else by a pattern, else by the name of a class, which any weight has."""

    def fits(target: str, kind: int) -> bool:
        if kind == 0:
            return target == module
        if kind == 1:
            return target.startswith("re:") and re.match(target[3:], module) is not None
        return "." not in target and not target.startswith("re:")

    ranked = (s for kind in range(3) for s in schemes for t in s.targets if fits(t, kind))
    return next(ranked, None)


def _make(schemes: Sequence[Scheme], found: Found) -> Made:
    scheme = _of(found.module, schemes)
    if scheme is None:
        raise found.error("is packed, and no group of the configuration names it")
    packed = found.name.endswith("_packed")
    if scheme.form == INTEGERS and found.dtype() == "I32" and not scheme.floating and packed:
        return _integers(scheme, found)
    if scheme.form in (FP4, WIDE) and found.dtype() == "U8" and packed:
        return _halves(scheme, found)
    if scheme.form in PLAIN and not packed and scheme.floating == (found.dtype() != "I8"):
        return _plain(scheme, found)
    raise found.error(f"is not what {scheme} has")


def _integers(scheme: Scheme, found: Found) -> Made:
    if len(found.shape()) != 2:
        raise found.error("is no matrix")
    rows, words = found.shape()
    columns = _columns(scheme, found)
    group = scheme.group or columns
    count = -(-columns // group)
    if words != -(-columns * scheme.bits // 32):
        raise found.error(
            f"does not hold {columns} numbers of {scheme.bits} bits in a row, as "
            f"{found.parts['scale']} {[*found.shape('scale')]} in groups of {group} says"
        )
    one = ((1,), (), (1, 1)) if scheme.strategy == "tensor" else ()
    found.expect("scale", (rows, count), *one, dtypes=SCALES)
    if scheme.symmetric == ("zero" in found.parts):
        wrong = "has zero points" if scheme.symmetric else "has no zero points"
        raise found.error(f"{wrong}, and the configuration says symmetric {scheme.symmetric}")
    if "zero" in found.parts:
        found.expect("zero", (-(-rows * scheme.bits // 32), count), dtypes=("I32",))
    if "groups" in found.parts:
        found.expect("groups", (columns,), dtypes=("I32",))
    decode = partial(decoding.packed_rows, bits=scheme.bits, group=group)
    return found.dtype("scale"), (rows, columns), decode


def _columns(scheme: Scheme, found: Found) -> int:
    """How many inputs there are: a row's last word need not be full."""
    if scheme.group and len(found.shape("scale")) == 2:
        return found.shape("scale")[1] * scheme.group
    if "shape" in found.parts and found.peek is not None:
        found.expect("shape", (2,), dtypes=("I64", "I32"))
        return found.peek(found.parts["shape"])[1]
    return found.shape()[-1] * 32 // scheme.bits


def _halves(scheme: Scheme, found: Found) -> Made:
    size = 16 if scheme.form == FP4 else 32
    shape = (*found.shape()[:-1], 2 * found.shape()[-1])
    if len(shape) != 2 or shape[1] % size or scheme.bits != 4 or not scheme.symmetric:
        raise found.error(f"is not what {scheme} has")
    scales = (shape[0], shape[1] // size)
    found.expect("scale", scales, dtypes=("F8_E4M3",) if size == 16 else ("U8", "F8_E8M0"))
    if size == 32:
        return "BF16", shape, decoding.microscaled
    if "whole" not in found.parts:
        raise found.error("is packed, and has no weight_global_scale beside it")
    found.expect("whole", (1,), (), dtypes=("F32",))
    return "BF16", shape, partial(decoding.two_scales, inverse=True, into=torch.bfloat16)


def _plain(scheme: Scheme, found: Found) -> Made:
    shape = found.shape()
    matrix = shape if len(shape) > 1 else (1, *shape)
    stated = scheme.block or ((1, scheme.group) if scheme.group else None)
    block = blocks(found, matrix, stated)
    if scheme.form == "mxfp8-quantized":
        if found.dtype("scale") not in ("U8", "F8_E8M0"):
            raise found.error(f"has scales of {found.dtype('scale')} in place of exponents")
        return "F32", shape, partial(decoding.floats, block=block)
    found.expect("scale", found.shape("scale"), dtypes=SCALES)
    if "zero" in found.parts:
        found.expect("zero", found.shape("scale"), dtypes=("I8", *SCALES))
    elif not scheme.symmetric:
        raise found.error("has no zero points, and the configuration says symmetric False")
    return found.dtype("scale"), shape, partial(decoding.scaled, block=block)
