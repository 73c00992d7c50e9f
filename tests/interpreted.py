"""Triton's interpreter, for tests: faster, in any order of programs, and with every access seen.

Uses its private parts, so `pytest` on a triton other than the pinned one may have to adapt this
file. Imported only in a process that has TRITON_INTERPRET set.
"""

import inspect
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import plain_routing
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, interpreter_builder

from reap_kernels.contract import Call
from reap_kernels.triton.configs import Config
from reap_kernels.triton.tiles import locate, locate_slab

_patch_lang = interpreter._patch_lang
_patched: set[int] = set()
_langs: dict[int, set[int]] = {}  # of the globals of functions


class _Nothing:
    def restore(self):
        pass


def _patch_once(function):
    """The interpreter patches all of triton.language at each call of a helper; once will do."""
    space = function.__globals__
    if id(space) not in _langs:
        modules = {id(v) for v in space.values() if inspect.ismodule(v)}
        _langs[id(space)] = modules & {id(tl), id(tl.core)}
    new = _langs[id(space)] - _patched
    if not new:
        return _Nothing()
    scope = _patch_lang(function)
    restore = scope.restore
    _patched.update(new)

    def undo():
        _patched.difference_update(new)
        restore()

    scope.restore = undo
    return scope


def _looked_up_once(get_np_dtype):
    """The interpreter makes its table of numpy's types anew at each look."""
    found: dict[str, np.dtype] = {}

    def wrapper(dtype):
        name = dtype.scalar.name
        if name not in found:
            found[name] = get_np_dtype(dtype)
        return found[name]

    return wrapper


def _made_once(init):
    """Types of blocks are made at every operation, out of few elements and shapes."""
    states: dict[tuple, dict] = {}

    def wrapper(self, element_ty, shape):
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in states:
            init(self, element_ty, shape)
            states[key] = dict(vars(self))
        vars(self).update(states[key])

    return wrapper


def speed_up():
    interpreter._patch_lang = _patch_once
    interpreter._get_np_dtype = _looked_up_once(interpreter._get_np_dtype)
    tl.core.block_type.__init__ = _made_once(tl.core.block_type.__init__)
    # Overflow checks of the integer arithmetic, which the GPU does not have either.
    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)


@contextmanager
def backwards(monkeypatch):
    """Programs run from the last to the first."""
    forwards = InterpreterBuilder.set_grid_idx

    def set_grid_idx(self, *index):
        forwards(self, *(n - 1 - i for n, i in zip(self.grid_dim, index, strict=True)))

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "set_grid_idx", set_grid_idx)
        yield


class Traffic:
    """Bytes by kernel, argument and direction. An address that several lanes of one instruction
    read counts once. An access outside the kernel's arguments is an AssertionError."""

    def __init__(self):
        self.bytes = defaultdict(int)
        self.launches = []
        self._ranges = []

    def enter(self, kernel: str, arguments: dict):
        self.launches.append(kernel)
        self._ranges = []
        for name, tensor in arguments.items():
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
                start, size = tensor.data_ptr(), tensor.element_size()
                self._ranges.append((start, start + (last + 1) * size, size, (kernel, name)))

    def see(self, direction: str, pointers, mask):
        addresses = np.unique(np.broadcast_to(pointers, np.broadcast(pointers, mask).shape)[mask])
        if not addresses.size:
            return
        first, last = int(addresses[0]), int(addresses[-1])
        for start, end, size, name in self._ranges:
            if start <= first and last + size <= end:
                key = (*name, direction)
                self.bytes[key] += size * addresses.size
                return
        raise AssertionError(f"{direction} outside of every argument of {self.launches[-1]}")

    def of(self, kernel: str, direction: str) -> dict[str, int]:
        return {
            name: total
            for (where, name, way), total in self.bytes.items()
            if where == kernel and way == direction
        }


@contextmanager
def traffic(monkeypatch):
    """Counts what the kernels inside load, store and add atomically."""
    seen = Traffic()
    run, load = GridExecutor.__call__, InterpreterBuilder.create_masked_load
    store, atomic = InterpreterBuilder.create_masked_store, InterpreterBuilder.create_atomic_rmw

    def watched_run(self, *args, **kwargs):
        seen.enter(self.fn.__name__, dict(zip(self.arg_names, args, strict=False)) | kwargs)
        return run(self, *args, **kwargs)

    def watched_load(self, ptrs, mask, *rest):
        seen.see("load", ptrs.data, mask.data)
        return load(self, ptrs, mask, *rest)

    def watched_store(self, ptrs, value, mask, *rest):
        seen.see("store", ptrs.data, mask.data)
        return store(self, ptrs, value, mask, *rest)

    def watched_atomic(self, op, ptr, val, mask, *rest):
        seen.see("atomic", ptr.data, mask.data)
        return atomic(self, op, ptr, val, mask, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", watched_run)
        patch.setattr(InterpreterBuilder, "create_masked_load", watched_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", watched_store)
        patch.setattr(InterpreterBuilder, "create_atomic_rmw", watched_atomic)
        yield seen


@contextmanager
def products(monkeypatch):
    """Counts the matrix products inside, by their rows."""
    seen: Counter[int] = Counter()
    dot = InterpreterBuilder.create_dot

    def watched(self, a, *rest):
        seen[a.data.shape[0]] += 1
        return dot(self, a, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", watched)
        yield seen


@triton.jit
def _look(
    found, tile_expert, first_tile, offsets, E, columns, slab, group_m,
    N: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, N)
    program = tl.minimum(place, tl.load(first_tile + E) * columns - 1)
    program, first, here = locate_slab(program, first_tile, E, columns, slab)
    tile = locate(program, tile_expert, first_tile, offsets, here, group_m, M)
    for i in tl.static_range(4):
        tl.store(found + i * N + place, tile[i] + (first if i == 3 else 0))


def tiles_in_order(call: Call, config: Config, slab: int) -> tuple[list[int], list[list[int]]]:
    """Slots by sorted position, and of every program of down its expert, first position, end and
    column tile, by the kernels' own functions on all programs at once."""
    routed = plain_routing.route(call.top_k_index, call.E)
    tiles = -(-routed.counts // config.block_m)
    first_tile = torch.nn.functional.pad(tiles.cumsum(0), (1, 0))
    tile_expert = torch.arange(call.E).repeat_interleave(tiles)
    columns = -(-call.H // config.down.block_n)
    number = len(tile_expert) * columns
    found = torch.zeros(4, triton.next_power_of_2(number), dtype=torch.int32)
    tables = [table.int() for table in (tile_expert, first_tile, routed.offsets)]
    sizes = (call.E, columns, min(slab, columns), config.down.group_m)
    _look[(1,)](found, *tables, *sizes, N=found.shape[1], M=config.block_m)
    return routed.order.tolist(), found[:, :number].T.tolist()
