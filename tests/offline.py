"""Compiles the Triton kernels for GPUs that are not there, and reads what the compiler made.

    python tests/offline.py sm_90                 # every shipped config, a JSON line per kernel
    python tests/offline.py sm_90 --large         # the config for many rows, plainest layout

A process of its own: the kernels must be decorated without TRITON_INTERPRET.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import sass
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from reap_kernels.contract import FLAGS, Call, Saliency, Summed, make_call
from reap_kernels.triton import (
    configs,
    down,
    finish,
    gate_up,
    launch,
    routing,
    slotsums,
    statistics,
)

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
# chip -> (family of configs, target, instruction that must be there for 16-bit models)
CHIPS = {
    "sm_80": ("sm_80", GPUTarget("cuda", 80, 32), "HMMA"),
    "sm_86": ("sm_86", GPUTarget("cuda", 86, 32), "HMMA"),
    "sm_89": ("sm_86", GPUTarget("cuda", 89, 32), "HMMA"),
    "sm_90": ("sm_90", GPUTarget("cuda", 90, 32), "HGMMA"),
    "sm_100": ("sm_100", GPUTarget("cuda", 100, 32), "UTCHMMA"),
    "sm_120": ("sm_86", GPUTarget("cuda", 120, 32), "HMMA"),
    "gfx942": ("gfx942", GPUTarget("hip", "gfx942", 64), "v_mfma"),
    "gfx950": ("gfx942", GPUTarget("hip", "gfx950", 64), "v_mfma"),
}
# Shared memory where it is not the family's. [bytes]
LIMITS = {"gfx950": 160 << 10}


class Variant(NamedTuple):
    """What changes the code of a kernel, beside its config."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    H: int = 2048
    I: int = 768  # noqa: E741
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    bias: bool = False
    activation: str = "silu"
    deterministic: bool = False


VARIANTS = {
    16: (
        Variant("plain"),
        Variant("fp16", dtype=torch.float16),
        Variant("transposed", transposed=True, activation="gelu"),
        Variant("odd sizes", H=2047, I=767, bias=True, activation="gelu_tanh"),
        Variant(
            "gpt-oss",
            H=2880,
            I=2880,
            interleaved=True,
            transposed=True,
            bias=True,
            activation="swiglu_clamped(1.702, 7.0, 1.0)",
        ),
        Variant("interleaved rows", interleaved=True, deterministic=True),
        Variant("ungated", gated=False, activation="relu2", deterministic=True),
    ),
    32: (
        Variant("plain", dtype=torch.float32),
        Variant("odd sizes", dtype=torch.float32, H=2047, I=767, bias=True, interleaved=True),
        Variant("ungated", dtype=torch.float32, gated=False, transposed=True, deterministic=True),
    ),
}


def compiled(kernel, arguments: dict, options: dict, target: GPUTarget):
    """A kernel specialised as the launcher would: on None, on 1, and on multiples of 16."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        fixed = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (fixed and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            tensor = isinstance(value, torch.Tensor)
            signature[parameter.name] = TYPES[value.dtype] if tensor else "i32"
            vague = parameter.do_not_specialize_on_alignment
            if (tensor and not vague) or (fixed and value % 16 == 0):
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def resources(binary) -> dict:
    """Registers, bytes of local memory, of spills and of shared memory, the tensor-core
    instructions of a compiled kernel, and whether what it loads leaves the cache first."""
    if "amdgcn" in binary.asm:
        text = binary.asm["amdgcn"]

        def read(name: str) -> int:
            (number,) = re.findall(rf"\.{name}:\s+(\d+)", text)
            return int(number)

        return {
            "registers": read("vgpr_count"),
            "local": read("private_segment_fixed_size"),
            "spills": read("vgpr_spill_count"),
            "shared": binary.metadata.shared,
            "tensor": sorted(set(re.findall(r"v_mfma\w+", text))),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = sass.tool("cuobjdump", "--dump-resource-usage", file.name)
        code = sass.tool("nvdisasm", "-c", file.name)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": used["REG"],
        "local": used["STACK"] + used["LOCAL"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "shared": binary.metadata.shared,
        "tensor": sorted(set(re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)[\w.]*", code))),
        "loop": sass.share(sass.main_loop(code)),
        "passing": "evict_first" in binary.asm["ptx"],
    }


def call(variant: Variant, T: int = 4096, K: int = 8, E: int = 128) -> Call:
    """A call without memory."""
    H, I = variant.H, variant.I  # noqa: E741
    R = 2 * I if variant.gated else I

    def empty(*shape, dtype=variant.dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    up, down_proj = empty(E, R, H), empty(E, H, I)
    if variant.transposed:
        up, down_proj = empty(E, H, R), empty(E, I, H)
    routed = empty(T, K, dtype=torch.int64), empty(T, K)
    biases = (empty(E, R), empty(E, H)) if variant.bias else (None, None)
    flags = {name: getattr(variant, name) for name in FLAGS}
    return make_call(
        empty(T, H), up, down_proj, *routed, *biases, activation=variant.activation, **flags
    )


def gemms(chip: str, config: configs.Config, variant: Variant) -> Iterator[dict]:
    _, target, _ = CHIPS[chip]
    made = call(variant)
    tiles = routing.allocate(made, config.block_m, made.top_k_index.new_empty)
    x, S, width = made.hidden_states, made.T * made.K, launch.slab_width(made, config)
    wide = x.new_empty((S, width), dtype=torch.float32)
    inner = x.new_empty((S, made.I))
    buffers = {"inner": inner, "combined": wide, "squares": wide, "peaks": wide}
    slab = {"first_column": 0, "W": width, "slab": 2}
    sums = None if made.deterministic else wide
    for kernel, arguments, tile in (
        (
            gate_up.gate_up_kernel,
            gate_up.arguments(made, tiles, inner, sums, config),
            config.gate_up,
        ),
        (down.down_kernel, down.arguments(made, tiles, buffers, config) | slab, config.down),
    ):
        yield resources(compiled(kernel, arguments, launch.options(tile), target)) | {
            "kernel": kernel.__name__, "variant": variant.name, "config": repr(config)
        }  # fmt: skip


def small_kernels(chip: str) -> Iterator[dict]:
    """Routing, finish, sums over slots, and statistics with pairs and without."""
    _, target, _ = CHIPS[chip]
    made = call(VARIANTS[16][0])
    x, ids = made.hidden_states, made.top_k_index
    tiles = routing.allocate(made, 128, ids.new_empty)
    counts = totals = tiles.order
    shared = routing.arguments(made)
    norms = x.new_empty(ids.shape, dtype=torch.float32)
    result = Saliency(x, norms, norms)
    done = finish.arguments(made, tiles, result) | launch.finish_sizes(made) | {
        "combined": norms, "squares": norms, "partial_peaks": norms, "CAST": True,
        "tiles": 16, "first_column": 0, "W": made.H,
    }  # fmt: skip
    cells = counts.new_empty((20, 1), dtype=torch.int64)
    sums = statistics.Accumulators(cells, cells, norms, cells, cells, cells, cells)
    slots = (ids, made.top_k_weights, norms, norms)
    mask = ids.new_empty((made.T,), dtype=torch.bool)
    placed = {"before": counts, "totals": totals, "BLOCK_M": 128, **tiles.arguments(), **shared}
    summed = made._replace(sum_weights=norms.new_empty((2, *ids.shape)))
    sums_of = Summed(*result, norms, norms)
    routed = placed | {"WIDE": routing.WIDE}
    for kernel, arguments in (
        (routing.route_kernel, routed),
        (routing.count_kernel, {"counts": counts, **shared}),
        (routing.scan_kernel, {"counts": counts, "totals": totals, "blocks": 16, "BLOCK": 256}),
        (routing.place_kernel, placed),
        (finish.finish_kernel, done),
        (slotsums.sum_kernel, slotsums.sum_arguments(summed, tiles, x, norms, sums_of)),
        (slotsums.project_kernel, slotsums.project_arguments(summed, norms, sums_of)),
        (
            slotsums.project_kernel,
            slotsums.project_arguments(
                made._replace(down_proj=made.down_proj.mT, transposed=True), norms, sums_of
            ),
        ),
        (statistics.statistics_kernel, statistics.arguments(slots, mask, sums, True)),
        (
            statistics.statistics_kernel,
            statistics.arguments(
                slots, None, sums._replace(pair_count=None, pair_sums=None), False
            ),
        ),
    ):
        binary = compiled(kernel, arguments, {"num_warps": 4, "debug": bool(kernel.debug)}, target)
        code = binary.asm.get("ptx") or binary.asm["amdgcn"]
        yield resources(binary) | {
            "kernel": kernel.__name__, "variant": "", "config": "", "asserts": "assert" in code
        }  # fmt: skip


def every(chip: str, large: bool) -> Iterator[dict]:
    family, _, instruction = CHIPS[chip]
    choices = configs.CHOICES[family]
    limit = LIMITS.get(chip, configs.SHARED_LIMIT[family])
    if large:
        choices = tuple(c for c in choices if c.bits == 16 and not c.unaligned)[-1:]
    else:
        yield from small_kernels(chip)
    for choice in choices:
        variants = VARIANTS[choice.bits][: 1 if large else None]
        if not large:
            variants = tuple(v for v in variants if choice.unaligned or configs.aligned(call(v)))
        for variant in variants:
            few = choice.config.block_m < 64 and instruction == "HGMMA"  # wgmma takes 64 rows
            needed = [] if choice.bits == 32 else ["HMMA" if few else instruction]
            config = choice.config
            if large and family in configs.HINTED:
                config = replace(config, slab=2)
            for found in gemms(chip, config, variant):
                yield found | {"needed": needed, "limit": limit}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("chip", choices=CHIPS)
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    for row in every(options.chip, options.large):
        print(json.dumps(row), flush=True)
