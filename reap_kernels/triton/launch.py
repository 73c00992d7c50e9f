"""One MoE layer as launches: zero, count, scan, place, gate_up, down, finish."""

import torch
import triton
from torch import Tensor

from reap_kernels.contract import Call, Saliency
from reap_kernels.triton import down, finish, gate_up, routing
from reap_kernels.triton.configs import Config, Tile
from reap_kernels.triton.routing import Tiles

# Tokens per program of the last kernel, and the columns that it handles at a time.
FINISH_TOKENS, FINISH_COLUMNS = 4, 1024


def run(call: Call, config: Config) -> Saliency:
    """The call's result. Seven launches with atomic combine (six if the model is fp32); with the
    deterministic one two more for every slab but the first, and no zeroing."""
    x, S = call.hidden_states, call.T * call.K
    result = Saliency(
        x.new_empty((call.T, call.H)),
        x.new_empty((call.T, call.K), dtype=torch.float32),
        x.new_empty((call.T, call.K), dtype=torch.float32),
    )
    if S == 0:
        return result
    tiles = routing.route(call, config.block_m)

    inner = x.new_empty((S, call.I))
    grid = (gate_up.programs(call, tiles, config),)
    gate_up.gate_up_kernel[grid](
        **gate_up.arguments(call, tiles, inner, config), **options(config.gate_up)
    )
    partials = (triton.cdiv(call.H, config.down.block_n), S)
    buffers = {
        "inner": inner,  # [S, I]
        "squares": x.new_empty(partials, dtype=torch.float32),
        "peaks": x.new_empty(partials, dtype=torch.float32),
    }
    combine(call, tiles, buffers, result, config)
    return result


def combine(
    call: Call, tiles: Tiles, buffers: dict[str, Tensor], result: Saliency, config: Config
) -> None:
    """The down projection and everything after it, in one piece or slab by slab."""
    x, width = call.hidden_states, slab_width(call, config)
    if call.deterministic:
        combined = x.new_empty((call.T * call.K, width), dtype=torch.float32)
    elif x.dtype == torch.float32:
        combined = result.out.zero_()
    else:
        combined = torch.zeros((call.T, call.H), dtype=torch.float32, device=x.device)

    multiply = down.arguments(call, tiles, buffers | {"combined": combined}, config)
    add = finish.arguments(call, tiles, result) | {
        "combined": combined,
        "squares": buffers["squares"],
        "partial_peaks": buffers["peaks"],
        "CAST": combined is not result.out,
    }
    for first in range(0, call.H, width):
        slab = {"first_column": first, "W": min(width, call.H - first)}
        grid = (tiles.bound * triton.cdiv(slab["W"], config.down.block_n),)
        down.down_kernel[grid](**multiply, **slab, **options(config.down))
        last = first + width >= call.H
        finish.finish_kernel[(triton.cdiv(call.T, FINISH_TOKENS),)](
            **add, **slab, **finish_sizes(call), tiles=len(buffers["squares"]) if last else 0
        )


def slab_width(call: Call, config: Config) -> int:
    """Columns of the output at a time: all of them, or in deterministic mode as many as keep the
    slab [S, width] fp32 within the bytes of the inner tensor, but at least one column tile.

    The price of determinism: at most the inner tensor's memory once more (201 MB for a layer of
    Qwen3-30B-A3B at T = 16384), two launches per slab (six slabs there), and inner read again for
    each. In bytes of the sums the modes are even: 8 per slot and column, a slab written and read
    back or a cell of the output read and written.
    """
    if not call.deterministic:
        return call.H
    fitting = call.I * call.hidden_states.element_size() // 4
    tiles = max(1, fitting // config.down.block_n)
    return min(call.H, tiles * config.down.block_n)


def finish_sizes(call: Call) -> dict[str, int]:
    return {
        "BLOCK_S": triton.next_power_of_2(FINISH_TOKENS * call.K),
        "BLOCK_T": FINISH_TOKENS,
        "BLOCK_N": min(FINISH_COLUMNS, triton.next_power_of_2(call.H)),
    }


def options(tile: Tile) -> dict:
    """Of the compiler; fusing a multiply with an add is its default today, but not tomorrow."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
