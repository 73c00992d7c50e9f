"""What the host hands to a GPU: every launch, its grid, shared memory and stream, and every tensor
map, as a recording CUDA runtime sees them, against what must hold by CUDA's rules and by the sizes
of the call."""

import subprocess
from itertools import product
from typing import Any, NamedTuple

import cases
import cudart
import nvcc
import pytest
import torch
from cases import Case

from reap_kernels import cuda, cuda_sm90
from reap_kernels.contract import Call, make_call

pytestmark = pytest.mark.skipif(cudart.missing() is not None, reason=str(cudart.missing()))

STREAM = 0x5EED
DTYPES = (torch.bfloat16, torch.float16)
KB = 1 << 10
# What a block may have of shared memory when it asks, by the CUDA C++ Programming Guide's table of
# compute capabilities.
SHARED = {80: 163 * KB, 86: 99 * KB, 89: 99 * KB, 90: 227 * KB, 100: 227 * KB, 120: 99 * KB}
CHIPS = {
    80: cuda.Chip(0, 80, 108, 40 << 20),
    86: cuda.Chip(1, 86, 84, 6 << 20),
    89: cuda.Chip(0, 89, 142, 96 << 20),
    90: cuda.Chip(2, 90, 132, 50 << 20),
    100: cuda.Chip(0, 100, 148, 126 << 20),
    120: cuda.Chip(0, 120, 188, 128 << 20),
}
# The two sets of kernels.
ANY, HOPPER = False, True
COLUMNS = {ANY: 128, HOPPER: 256}  # of a tile


def prepare():
    if cudart.missing() is None:
        cudart.library()


class Recorded(NamedTuple):
    call: Call
    chip: cuda.Chip
    wgmma: bool
    result: Any
    workspace: torch.Tensor
    launches: list
    maps: list

    def named(self, name: str) -> list:
        """The launches of a kernel, whatever its template arguments."""
        wanted = f"sm90::{name}" if self.wgmma and name in ("gate_up", "down") else name
        return [x for x in self.launches if nvcc.short(x.kernel).startswith(f"{wanted}_kernel")]

    def names(self) -> list[str]:
        shorts = [nvcc.short(x.kernel).removeprefix("sm90::") for x in self.launches]
        return [name.partition("<")[0].removesuffix("_kernel") for name in shorts]


def record(call: Call, chip: cuda.Chip, wgmma: bool = False, **settings) -> Recorded:
    cudart.recorder().reset(**settings)
    allocated: list[torch.Tensor] = []
    empty = torch.empty

    def remember(*args, **kwargs):
        allocated.append(empty(*args, **kwargs))
        return allocated[-1]

    torch.empty = remember
    try:
        result = cuda.execute(cudart.extension(), call, chip, STREAM, wgmma=wgmma)
    finally:
        torch.empty = empty
    (workspace,) = (x for x in allocated if x.dtype == torch.uint8)
    recorder = cudart.recorder()
    return Recorded(call, chip, wgmma, result, workspace, recorder.launches(), recorder.maps())


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def most_row_tiles(slots: int, experts: int, rows: int) -> int:
    """Of the worst routing: an expert's first slot opens a tile, and so does every `rows`-th after."""
    opened = min(slots, experts)
    return opened + (slots - opened) // rows


def tile_rows(gate_up) -> int:
    name = nvcc.short(gate_up.kernel)
    return 128 if name.startswith("sm90::") else int(name.split(", ")[1])


def check_limits(seen: Recorded) -> None:
    """What any launch must keep to, on the chip that it is for."""
    assert seen.launches
    for launch in seen.launches:
        assert launch.stream == STREAM and launch.device == seen.chip.device
        x, y, z = launch.grid
        assert 1 <= x < 2**31 and 1 <= y < 2**16 and 1 <= z < 2**16
        threads = launch.block[0] * launch.block[1] * launch.block[2]
        assert 1 <= threads <= 1024 and threads % 32 == 0
        assert launch.shared <= launch.allowed, "more than 48 KB must be asked for"
        assert launch.shared <= SHARED[seen.chip.sm]
    # Two blocks per processor are what the tiles of the general kernels are cut for.
    for launch in seen.named("gate_up") + seen.named("down") if not seen.wgmma else ():
        assert launch.shared <= 96 * KB


def check_grids(seen: Recorded) -> None:
    call, slots = seen.call, seen.call.T * seen.call.K
    up, downs = seen.named("gate_up")[0], seen.named("down")
    rows = most_row_tiles(slots, call.E, tile_rows(up))
    columns = COLUMNS[seen.wgmma]
    up_tiles = rows * ceil_div(call.R, columns)
    if seen.wgmma:  # persistent
        assert up.grid[0] == min(seen.chip.processors, up_tiles)
    else:
        assert up.grid[0] >= up_tiles
    assert len(downs) == len(seen.named("finish"))
    if not call.deterministic:
        assert len(downs) == 1
    covered = 0  # columns of the output
    for down in downs:
        assert tile_rows(down) == tile_rows(up), "one table of row tiles serves both"
        if seen.wgmma:
            assert down.grid[0] <= seen.chip.processors
        else:
            assert down.grid[0] % rows == 0
            covered += down.grid[0] // rows * columns
    assert seen.wgmma or covered >= call.H > covered - columns
    for finish in seen.named("finish"):
        assert finish.grid[0] >= call.T and finish.grid[0] * finish.block[0] >= slots


def check_map(made, address: int, sizes: list[int], strides: list[int], box: list[int]) -> None:
    """By the rules of cuTensorMapEncodeTiled, and of the tensor: elements, and strides in elements."""
    assert made.type == 1 and made.interleave == 0 and made.fill == 0  # UINT16, none, zeros
    assert made.swizzle == 3 and made.box[0] * 2 == 128  # of 128 bytes
    assert made.address == address and made.address % 16 == 0
    assert made.sizes == sizes and all(1 <= size <= 2**32 for size in made.sizes)
    for size, stride, given in zip(sizes[1:], strides[1:], made.strides, strict=True):
        assert given % 16 == 0 and 0 < given < 2**40
        assert size == 1 or given == 2 * stride  # of a size of 1 any will do
    assert made.box == box and all(1 <= each <= 256 for each in made.box)
    assert made.steps == [1] * len(sizes)


def check_weight_map(made, weight: torch.Tensor, call: Call, halves: int) -> None:
    rows_dim, k_dim = (2, 1) if call.transposed else (1, 2)
    rows, k = weight.shape[rows_dim] // halves, weight.shape[k_dim]
    row_stride, k_stride = weight.stride(rows_dim), weight.stride(k_dim)
    half, expert = (halves, rows * row_stride), (weight.shape[0], weight.stride(0))
    if k_stride == 1 or k == 1:
        dims, box = [(k, 1), (rows, row_stride), half, expert], [64, 64, 1, 1]
    else:
        assert row_stride == 1
        dims, box = [(rows, 1), half, (k, k_stride), expert], [64, 1, 64, 1]
    sizes, strides = map(list, zip(*dims, strict=True))
    check_map(made, weight.data_ptr(), sizes, strides, box)


def check_maps(seen: Recorded) -> None:
    call = seen.call
    if not seen.wgmma:
        assert not seen.maps
        return
    weights = {"gate_up": None, "down": None}
    for made in seen.maps:
        if len(made.sizes) == 2:
            pitch = ceil_div(call.I, 8) * 8
            inside = made.address - seen.workspace.data_ptr()
            assert 0 <= inside and inside + 2 * pitch * call.T * call.K <= seen.workspace.numel()
            check_map(made, made.address, [call.I, call.T * call.K], [1, pitch], [64, 128])
        elif made is seen.maps[0]:
            halves = 2 if call.gated and not call.interleaved else 1
            check_weight_map(made, call.gate_up_proj, call, halves)
            weights["gate_up"] = made
        else:
            check_weight_map(made, call.down_proj, call, 1)
            weights["down"] = made
    assert all(weights.values())


def check(call: Call, chip: cuda.Chip, wgmma: bool) -> Recorded:
    seen = record(call, chip, wgmma)
    check_limits(seen)
    check_grids(seen)
    check_maps(seen)
    assert seen.workspace.data_ptr() % 16 == 0
    return seen


def call_of(case: Case, dtype: torch.dtype, deterministic: bool, **changes) -> Call:
    return make_call(**cases.make(case, dtype) | changes, deterministic=deterministic)


def kinds(call: Call):
    """The kernels that can run the call: those for Hopper if TMA can read it."""
    return (ANY, HOPPER) if cuda_sm90.unsupported_layout(call) is None else (ANY,)


def test_no_object_file_ends_the_process():
    """nvcc makes exit(1) of a call of device code from a template of the host, and says nothing."""
    for path in cudart.objects():
        names = subprocess.run(["nm", "-u", path], capture_output=True, text=True, check=True)
        symbols = {line.split()[-1].partition("@")[0] for line in names.stdout.splitlines()}
        assert "memcpy" in symbols or "strlen" in symbols  # nm was understood
        assert not symbols & {"exit", "_exit", "abort"}, path.name


SIZES = {
    "small": {"T": 33, "K": 3, "E": 4, "H": 136, "I": 136},
    "odd": {"T": 33, "K": 3, "E": 7, "H": 97, "I": 47},
    "wide": {"T": 300, "K": 4, "E": 5, "H": 520, "I": 72},
    "one of everything": {"T": 1, "K": 1, "E": 1, "H": 8, "I": 8},
    "more experts than slots": {"T": 2, "K": 2, "E": 61, "H": 64, "I": 24},
}


@pytest.mark.parametrize("strides", ("contiguous", "stepped", "permuted", "broadcast"))
@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=str)
def test_every_layout(layout, strides):
    hopper = 0
    for number, sizes in enumerate(SIZES.values()):
        case = cases.replace(layout, strides=strides, **sizes)
        call = call_of(case, DTYPES[number % 2], False)
        for chip, deterministic in product(CHIPS.values(), (False, True)):
            for wgmma in kinds(call) if chip.sm == 90 else (ANY,):
                check(call._replace(deterministic=deterministic), chip, wgmma)
                hopper += wgmma
    assert hopper or strides in ("stepped", "broadcast")
