"""One MoE layer as launches: route (or count, scan and place), gate_up, down, finish; where sums
over slots are asked for, sum and project behind gate_up."""

from typing import Any

import torch
import triton
from torch import Tensor

from reap_kernels.contract import TENSORS, Call, Saliency, Summed
from reap_kernels.triton import down, finish, gate_up, routing, slotsums
from reap_kernels.triton.announce import announced
from reap_kernels.triton.configs import Config, Tile
from reap_kernels.triton.replay import Plans, Recorder
from reap_kernels.triton.routing import Tiles

# Tokens per program of the last kernel, and the columns that it handles at a time.
FINISH_TOKENS, FINISH_COLUMNS = 4, 1024

_plans = Plans()


def run(call: Call, config: Config, key: Any, *, norms: bool = True) -> Saliency | Summed:
    """The call's result. Four launches for few slots and six for more; with the deterministic
    combine two more for every slab but the first, with sums over slots two more. key: the call's
    signature. norms: False leaves norms and peaks out, in memory of any content, to measure what
    they cost."""
    plan = _plans.get(key, config)
    if plan is not None:
        made = plan.run(call[: len(TENSORS)])
        return Saliency(*made) if call.sum_weights is None else Summed(*made)
    if call.transposed:  # a plan knows tensors by themselves, so views come first
        up, down_proj = call.gate_up_proj.mT, call.down_proj.mT
        call = call._replace(gate_up_proj=up, down_proj=down_proj, transposed=False)
    recorder = Recorder(call[: len(TENSORS)])
    with announced():
        result = launch(call, config, recorder, norms)
    if call.T or call.sum_weights is None:  # a plan would not zero sums
        _plans.put(key, config, recorder.plan())
    return result


def launch(call: Call, config: Config, recorder: Recorder, norms: bool = True) -> Saliency | Summed:
    x, S, f32 = call.hidden_states, call.T * call.K, torch.float32
    result: Saliency | Summed = Saliency(
        recorder.empty(call.T, call.H, dtype=x.dtype),
        recorder.empty(call.T, call.K, dtype=f32),
        recorder.empty(call.T, call.K, dtype=f32),
    )
    if call.sum_weights is not None:
        widths = call.I, call.H
        result = Summed(*result, *(recorder.empty(2, call.E, n, dtype=f32) for n in widths))
    if S == 0:
        for each in result[3:]:  # sums of nothing
            each.zero_()
        return result
    tiles = routing.route(call, config.block_m, recorder)

    inner = recorder.scratch(S, call.I, dtype=x.dtype)
    width = slab_width(call, config)
    if call.deterministic:
        combined = recorder.scratch(S, width, dtype=f32)
    elif x.dtype == f32:
        combined = result.out
    else:
        combined = recorder.scratch(call.T, call.H, dtype=f32)
    sums = None if call.deterministic else combined
    recorder.launch(
        gate_up.gate_up_kernel,
        (gate_up.programs(call, tiles, sums, config),),
        gate_up.arguments(call, tiles, inner, sums, config),
        **options(config.gate_up),
    )
    if isinstance(result, Summed):
        add_slots(call, tiles, inner, result, recorder)
    combine(call, tiles, inner, combined, result, config, recorder, norms)
    return result


def add_slots(call: Call, tiles: Tiles, inner: Tensor, result: Summed, recorder: Recorder) -> None:
    """The sums over slots, of inner rows and of outputs."""
    totals = recorder.scratch(2, 2, call.E, dtype=torch.float32)
    added, projected = slotsums.grids(call)
    arguments = slotsums.sum_arguments(call, tiles, inner, totals, result)
    recorder.launch(slotsums.sum_kernel, added, arguments)
    arguments = slotsums.project_arguments(call, totals, result)
    recorder.launch(slotsums.project_kernel, projected, arguments)


def combine(
    call: Call,
    tiles: Tiles,
    inner: Tensor,
    combined: Tensor,
    result: Saliency | Summed,
    config: Config,
    recorder: Recorder,
    norms: bool,
) -> None:
    """The down projection and everything after it, in one piece or slab by slab."""
    width, f32 = slab_width(call, config), torch.float32
    partials = (triton.cdiv(call.H, config.down.block_n), call.T * call.K)
    squares, peaks = (recorder.scratch(*partials, dtype=f32) if norms else None for _ in range(2))
    buffers = {"inner": inner, "squares": squares, "peaks": peaks, "combined": combined}
    multiply = down.arguments(call, tiles, buffers, config)
    add = finish.arguments(call, tiles, result) | {
        "combined": combined,
        "squares": squares,
        "partial_peaks": peaks,
        "CAST": combined is not result.out,
    }
    for first in range(0, call.H, width):
        slab = {"first_column": first, "W": min(width, call.H - first)}
        columns = triton.cdiv(slab["W"], config.down.block_n)
        order = {"slab": min(config.slab, columns)}
        grid = (tiles.bound * columns,)
        recorder.launch(down.down_kernel, grid, multiply | slab | order, **options(config.down))
        last = first + width >= call.H
        recorder.launch(
            finish.finish_kernel,
            (triton.cdiv(call.T, FINISH_TOKENS),),
            add | slab | finish_sizes(call) | {"tiles": partials[0] if last else 0},
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
