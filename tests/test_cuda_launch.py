"""What the host hands to a GPU: every launch, its grid, shared memory and stream, and every tensor
map, as a recording CUDA runtime sees them, against what must hold by CUDA's rules and by the sizes
of the call."""

import contextlib
import subprocess
import sys
from itertools import product
from types import SimpleNamespace
from typing import Any, NamedTuple

import arguments
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
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # as in csrc/layer.h
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
COLUMNS = {ANY: 128, HOPPER: 256}  # of a tile, but for down in the ping-pong form
FORMS = {"cooperative": 256, "pingpong": 192, "swapped": 256}  # of down's tiles on Hopper


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
    encoded: int  # maps that the driver made

    def named(self, name: str) -> list:
        """The launches of a kernel, whatever its template arguments and form."""
        found = [x for x, short in zip(self.launches, self.names(), strict=True) if short == name]
        if name in ("gate_up", "down"):
            assert all(nvcc.short(x.kernel).startswith("sm90::") == self.wgmma for x in found)
        return found

    def names(self) -> list[str]:
        shorts = [nvcc.short(x.kernel).partition("<")[0] for x in self.launches]
        names = [name.rpartition("::")[2].removesuffix("_kernel") for name in shorts]
        return [name.removesuffix("_pingpong") for name in names]

    @property
    def form(self) -> str:
        """Of Hopper's kernels."""
        both = self.named("gate_up") + self.named("down")
        (swapped,) = {"sm90::swapped::" in nvcc.short(x.kernel) for x in both}
        (in_turns,) = {"_pingpong" in x.kernel for x in self.named("down")}
        assert not (swapped and in_turns)
        return "swapped" if swapped else "pingpong" if in_turns else "cooperative"


def record(call: Call, chip: cuda.Chip, wgmma: bool = False, form: str = "automatic") -> Recorded:
    recorder = cudart.recorder()
    recorder.reset(arguments=arguments.sizes())
    allocated: list[torch.Tensor] = []
    empty = torch.empty

    def remember(*args, **kwargs):
        allocated.append(empty(*args, **kwargs))
        return allocated[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", remember)
        result = cuda.execute(cudart.extension(), call, chip, STREAM, wgmma=wgmma, form=form)
    (workspace,) = (x for x in allocated if x.dtype == torch.uint8)
    encoded = recorder.order().count("cuTensorMapEncodeTiled")
    return Recorded(call, chip, wgmma, result, workspace, recorder.launches(), encoded)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def most_row_tiles(slots: int, experts: int, rows: int) -> int:
    """Of the worst routing: an expert's first slot opens a tile, as does every `rows`-th after."""
    opened = min(slots, experts)
    return opened + (slots - opened) // rows


def tile_rows(gate_up) -> int:
    name = nvcc.short(gate_up.kernel)
    return 128 if name.startswith("sm90::") else int(name.split(", ")[1])


def check_limits(seen: Recorded) -> None:
    """What any launch must keep to, on the chip that it is for."""
    assert seen.launches
    for number, launch in enumerate(seen.launches):
        assert launch.stream == STREAM and launch.device == seen.chip.device
        # With the end of our launch before, for which kernels for older chips cannot wait.
        assert launch.overlapped == (seen.chip.sm >= 90 and number > 0)
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
    """Every row tile of the worst routing meets every column tile, zeros and results are whole."""
    call, slots = seen.call, seen.call.T * seen.call.K
    (up,), downs = seen.named("gate_up"), seen.named("down")
    rows = most_row_tiles(slots, call.E, tile_rows(up))
    columns = COLUMNS[seen.wgmma]
    across = FORMS[seen.form] if seen.wgmma else columns  # of a tile of down
    told = arguments.given(up)
    up_tiles = rows * told.walk.column_tiles
    width = told.pitch * (2 if call.gated else 1)
    assert told.walk.column_tiles == told.walk.slab == ceil_div(width, columns)
    assert told.pitch == ceil_div(call.I, 8) * 8
    shares = ceil_div(told.zero.count, 128 * 16)
    assert told.tiles == up_tiles
    persistent = min(seen.chip.processors, up_tiles)
    assert up.grid[0] == (persistent if seen.wgmma else up_tiles + shares)
    assert 16 * told.zero.count == (0 if call.deterministic else 4 * call.T * pitch_of(call))

    assert len(downs) == len(seen.named("finish"))
    reached = 0  # columns of the output
    for down, finish in zip(downs, seen.named("finish"), strict=True):
        assert tile_rows(down) == tile_rows(up), "one table of row tiles serves both"
        told, done = arguments.given(down), arguments.given(finish)
        assert told.combine.first_column == done.first_column == reached
        tiles = rows * told.walk.column_tiles
        assert 1 <= told.walk.slab <= told.walk.column_tiles and told.walk.group >= 1
        assert told.walk.slab == told.walk.column_tiles or not call.deterministic
        assert down.grid[0] == (min(seen.chip.processors, tiles) if seen.wgmma else tiles)
        assert done.last_column == min(reached + told.walk.column_tiles * across, call.H)
        assert done.last_column - reached <= told.combine.pitch == done.pitch
        reached = done.last_column
        assert done.parts == (ceil_div(call.H, 64) if reached == call.H else 0)
        assert finish.grid[0] >= call.T and finish.grid[0] * finish.block[0] >= slots
    assert reached == call.H and (call.deterministic or len(downs) == 1)


def pitch_of(call: Call) -> int:
    return ceil_div(call.H, 8) * 8


def is_read(address: int, tensor: torch.Tensor) -> bool:
    """As it is, in its dtype, unless it must be copied because it is not contiguous."""
    return (address == tensor.data_ptr()) == tensor.is_contiguous()


def check_routing(seen: Recorded) -> None:
    call, slots = seen.call, seen.call.T * seen.call.K
    routing = [x for x in seen.launches if x.shared <= 48 * KB and "finish" not in x.kernel]
    told = arguments.given(routing[0])
    names = seen.names()[: len(routing)]
    assert is_read(told.ids.data, call.top_k_index)
    assert told.ids.wide == (call.top_k_index.dtype == torch.int64)
    assert (told.E, told.S) == (call.E, slots)
    assert told.tile_rows == tile_rows(seen.named("gate_up")[0])
    assert (
        told.chunk % 32 == 0 and (told.chunks - 1) * told.chunk < slots <= told.chunks * told.chunk
    )
    table = 4 * (call.E + 1)
    if names == ["route"]:
        assert routing[0].grid[0] == 1 and routing[0].block[0] == 32 * told.chunks
        assert routing[0].shared == table * (told.chunks + 1)
    else:
        assert names == ["count", "scan", "place"]
        count, scan, place = routing
        assert count.grid[0] == told.chunks and scan.grid[0] == call.E + 1
        assert place.grid[0] >= max(told.chunks, call.E)
        assert count.shared == place.shared == table


def check_arguments(seen: Recorded) -> None:
    """Tensors as they are, and arrays side by side within the workspace."""
    call, slots, wgmma = seen.call, seen.call.T * seen.call.K, seen.wgmma
    (up_launch,), down_launch = seen.named("gate_up"), seen.named("down")[0]
    routing = arguments.given(seen.launches[0])
    up, down = arguments.given(up_launch), arguments.given(down_launch)
    rows, k = (2, 1) if call.transposed else (1, 2)
    for told, weight, bias in (
        (up.weights, call.gate_up_proj, call.gate_up_bias),
        (down.weights, call.down_proj, call.down_bias),
    ):
        strides = (told.expert_stride, told.row_stride, told.k_stride)
        for given, dim in zip(strides, (0, rows, k), strict=True):
            assert given == weight.stride(dim) or weight.shape[dim] == 1
        assert told.data == weight.data_ptr()
        assert told.bias == (0 if bias is None else bias.data_ptr())
        if bias is not None:
            assert (told.bias_expert_stride, told.bias_row_stride) == bias.stride()
    x = call.hidden_states
    rows = x if x.stride(1) == 1 else x.contiguous()
    assert up.hidden_stride == rows.stride(0) and (up.hidden == x.data_ptr()) == (rows is x)
    assert (up.K, up.walk.E, up.H, up.I) == (call.K, call.E, call.H, call.I)
    assert is_read(down.combine.gates.data, call.top_k_weights)
    assert DTYPES[down.combine.gates.dtype] == call.top_k_weights.dtype
    for launch in seen.named("finish"):
        done = arguments.given(launch)
        assert [done.out, done.norms, done.peaks] == [x.data_ptr() for x in seen.result]
    if wgmma:
        assert len({tuple(arguments.maps(launch)) for launch in seen.named("down")}) == 1
        # Each launch counts its tiles from 0, in a counter that routing cleared.
        counted = [arguments.counter(x) for x in (up_launch, *seen.named("down"))]
        assert counted == [routing.counters + 4 * i for i in range(len(counted))]
    assert routing.launches == 1 + len(seen.named("down"))

    combined = slots if call.deterministic else call.T
    arrays = {
        routing.order: 4 * slots,
        routing.offsets: 4 * (call.E + 1),
        routing.first_tile: 4 * (call.E + 1),
        routing.tile_expert: 4 * most_row_tiles(slots, call.E, routing.tile_rows),
        routing.totals: 4 * (call.E + 1),
        routing.counters: 4 * routing.launches,
        routing.counts: 4 * (call.E + 1) * routing.chunks,
        up.inner: 2 * slots * up.pitch,
        down.combine.partials: 8 * slots * ceil_div(call.H, 64),
        down.combine.combined: 4 * combined * down.combine.pitch,
    }
    at = seen.workspace.data_ptr()
    for start, size in sorted(arrays.items()):
        assert start >= at and start % 16 == 0
        at = start + size
    assert len(arrays) == 10 and at <= seen.workspace.data_ptr() + seen.workspace.numel()
    assert (up.zero.data, down.inner) == (down.combine.combined, up.inner)


def check_map(made, address: int, sizes: list[int], strides: list[int], box: list[int]) -> None:
    """By the rules of cuTensorMapEncodeTiled, and of the tensor; strides in elements."""
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
    """Three in all, however many slabs there are, and of weights only new ones are made."""
    call, slots = seen.call, seen.call.T * seen.call.K
    if not seen.wgmma:
        assert seen.encoded == 0
        return
    assert 1 <= seen.encoded <= 3
    numbers = arguments.maps(seen.named("gate_up")[0]) + arguments.maps(seen.named("down")[0])
    up, inner, down = map(cudart.recorder().map, numbers)
    check_weight_map(up, call.gate_up_proj, call, 2 if call.gated and not call.interleaved else 1)
    told = arguments.given(seen.named("down")[0])
    rows = 8 if seen.form == "swapped" else 64
    check_map(inner, told.inner, [call.I, slots], [1, told.inner_pitch], [64, rows])
    check_weight_map(down, call.down_proj, call, 1)


def check(call: Call, chip: cuda.Chip, wgmma: bool, form: str = "automatic") -> Recorded:
    seen = record(call, chip, wgmma, form)
    assert form in ("automatic", seen.form)
    check_limits(seen)
    check_grids(seen)
    check_maps(seen)
    check_routing(seen)
    if call.hidden_states.device.type == "cpu":  # elsewhere all addresses are 0
        check_arguments(seen)
    assert seen.workspace.data_ptr() % 16 == 0
    return seen


def call_of(case: Case, dtype: torch.dtype, deterministic: bool, **changes) -> Call:
    return make_call(**cases.make(case, dtype) | changes, deterministic=deterministic)


def kinds(call: Call, chip: cuda.Chip):
    """The kernels that can run the call: those for Hopper if TMA can read it, in each form."""
    if chip.sm != 90 or cuda_sm90.unsupported_layout(call) is not None:
        return [(ANY, "automatic")]
    return [(ANY, "automatic"), *((HOPPER, form) for form in FORMS)]


def test_no_object_file_ends_the_process():
    """nvcc makes exit(1) of a call of device code from a template of the host, and says nothing."""
    for path in cudart.objects():
        names = subprocess.run(["nm", "-u", path], capture_output=True, text=True, check=True)
        symbols = {line.split()[-1].partition("@")[0] for line in names.stdout.splitlines()}
        assert "memcpy" in symbols or "strlen" in symbols  # nm was understood
        assert not symbols & {"exit", "_exit", "abort"}, path.name


SIZES: dict[str, dict[str, Any]] = {
    "small": {"T": 33, "K": 3, "E": 4, "H": 136, "I": 136},
    "odd": {"T": 33, "K": 3, "E": 7, "H": 97, "I": 47},
    "wide": {"T": 300, "K": 4, "E": 5, "H": 520, "I": 72},
    "one of everything": {"T": 1, "K": 1, "E": 1, "H": 8, "I": 8},
    "more experts than slots": {"T": 2, "K": 2, "E": 61, "H": 64, "I": 24},
}


ROUTERS: tuple[dict[str, Any], ...] = (
    {},
    {"ids": torch.int32, "gates": None},
    {"ids": torch.int32, "gates": torch.float16},
)


@pytest.mark.parametrize("strides", ("contiguous", "stepped", "permuted", "broadcast"))
@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=str)
def test_every_layout(layout, strides):
    hopper = 0
    for number, sizes in enumerate(SIZES.values()):
        router = ROUTERS[number % len(ROUTERS)]
        case = cases.replace(layout, strides=strides, **sizes, **router)
        call = call_of(case, DTYPES[number % 2], False)
        for chip, deterministic in product(CHIPS.values(), (False, True)):
            for wgmma, form in kinds(call, chip):
                check(call._replace(deterministic=deterministic), chip, wgmma, form)
                hopper += wgmma
    assert hopper or strides in ("stepped", "broadcast")


# More slots, columns or rows than the small ones have; no memory is behind a tensor on "meta".
LARGE = [
    Case("qwen3", T=16384, K=8, E=128, H=2048, I=768),
    Case("deepseek-v3", T=16384, K=8, E=256, H=7168, I=2048),
    Case("mixtral, one token", T=1, K=2, E=8, H=4096, I=14336),
    Case("gpt-oss", T=4096, K=4, E=128, H=2880, I=2880, interleaved=True, transposed=True),
    Case("most experts, one slot of each", T=4096, K=1, E=4096, H=256, I=64),
    Case("one expert has all slots", T=1 << 20, K=1, E=1, H=256, I=64),
    Case("as many slots as may be", T=1 << 27, K=8, E=64, H=256, I=64),
]


def meta_call(case: Case, dtype=torch.bfloat16, deterministic=False) -> Call:
    T, K, E, H, I = case.T, case.K, case.E, case.H, case.I  # noqa: E741
    up, down = (E, 2 * I, H), (E, H, I)
    if case.transposed:
        up, down = (E, H, 2 * I), (E, I, H)
    kinds = [(T, H), up, down]
    tensors = [torch.empty(shape, dtype=dtype, device="meta") for shape in kinds]
    ids = torch.empty((T, K), dtype=torch.int64, device="meta")
    gates = torch.empty((T, K), dtype=torch.float32, device="meta")
    return make_call(
        *tensors, ids, gates, interleaved=case.interleaved, transposed=case.transposed,
        deterministic=deterministic,
    )  # fmt: skip


@pytest.mark.parametrize("deterministic", (False, True))
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_layers(case, deterministic):
    call = meta_call(case, deterministic=deterministic)
    assert cuda.unsupported_sizes(call) is None
    for chip in CHIPS.values():
        for wgmma, form in kinds(call, chip):
            check(call, chip, wgmma, form)


REAL_SIZES = {  # K, E, H, I
    "qwen3": (8, 128, 2048, 768),
    "deepseek-v3": (8, 256, 7168, 2048),
    "mixtral": (2, 8, 4096, 14336),
}


@pytest.mark.parametrize(
    ("name", "T", "columns", "in_turns"),
    [
        ("qwen3", 1024, 2048, 2112),  # the sums stay in the cache anyhow
        ("qwen3", 4096, 1024, 1152),
        ("qwen3", 16384, 1024, 2112),
        ("deepseek-v3", 16384, 7168, 7296),  # inner costs more to read again
        ("mixtral", 16384, 4096, 4224),
    ],
)
def test_columns_that_down_does_first(name, T, columns, in_turns):
    """Where that saves bytes; by an LRU cache's count and not by the model's name."""
    K, E, H, I = REAL_SIZES[name]  # noqa: E741
    call = meta_call(Case(name, T=T, K=K, E=E, H=H, I=I))
    for form, wanted in zip(("cooperative", "pingpong"), (columns, in_turns), strict=True):
        (down,) = check(call, CHIPS[90], HOPPER, form).named("down")
        assert arguments.given(down).walk.slab * FORMS[form] == wanted


def time_of_down(call: Call, chip: cuda.Chip, form: str) -> float:
    """Until the busiest block is done, in the time that a processor takes to load a byte: it loads
    the slices of its tiles one after the other, and a byte of results takes as long as two."""
    columns, groups = FORMS[form], 2 if form == "pingpong" else 1
    tiles = most_row_tiles(call.T * call.K, call.E, 128) * ceil_div(call.H, columns)
    loads = ceil_div(call.I, 64) * (128 + columns) * 64 * 2
    results = 2 * 128 * columns * 4
    turn, done = 0.0, [0.0] * groups  # when the next may multiply, and when each is through
    for number in range(ceil_div(tiles, chip.processors)):
        turn = max(turn, done[number % groups]) + loads
        done[number % groups] = turn + results
    return max(done)


ROWS = (2048, 4096, 16384)  # tokens, of which each of 64 experts has an eighth


def test_form_of_down():
    """By the count of bytes, and not by the model's name: tiles in turn where I is small, and wide
    ones where it is large or where H has no multiple of 192 near."""
    forms, chosen = ("cooperative", "pingpong"), set()
    for H, I, T in product((512, 2048, 2880, 4096, 7168), (64, 768, 2048, 14336), ROWS):  # noqa: E741
        call = meta_call(Case("", T=T, K=8, E=64, H=H, I=I))
        found = record(call, CHIPS[90], HOPPER).form
        times = {form: time_of_down(call, CHIPS[90], form) for form in forms}
        least, most = sorted(times.values())
        if most > 1.02 * least:
            assert times[found] == least, (H, I, T, times)
            chosen.add((found, T))
    assert chosen == set(product(forms, ROWS))
    for case, form in ((LARGE[0], "pingpong"), (LARGE[2], "cooperative"), (LARGE[3], "pingpong")):
        call = meta_call(cases.replace(case, T=16384))
        assert record(call, CHIPS[90], HOPPER).form == form, case


@pytest.mark.parametrize(
    ("name", "T", "swapped"),
    [
        ("qwen3", 1, True),
        ("qwen3", 64, True),
        ("qwen3", 3520, True),  # 220 rows for each expert
        ("qwen3", 3584, False),
        ("qwen3", 16384, False),
        ("deepseek-v3", 4096, True),
        ("deepseek-v3", 16384, False),
        ("mixtral", 512, True),
        ("mixtral", 1024, False),
    ],
)
def test_form_by_rows_for_each_expert(name, T, swapped):
    """Swapped where the weights take longer to come than to be multiplied by."""
    K, E, H, I = REAL_SIZES[name]  # noqa: E741
    seen = check(meta_call(Case(name, T=T, K=K, E=E, H=H, I=I)), CHIPS[90], HOPPER)
    assert (seen.form == "swapped") == swapped


@pytest.mark.parametrize("wgmma", (ANY, HOPPER))
@pytest.mark.parametrize(
    ("T", "routing"), [(1, ["route"]), (512, ["route"]), (513, ["count", "scan", "place"])]
)
def test_launches_are_few(T, routing, wgmma):
    """Of a layer of Qwen3-30B-A3B: four, and six for more than 4,096 slots."""
    call = meta_call(cases.replace(LARGE[0], T=T))
    seen = check(call, CHIPS[90], wgmma)
    assert seen.names() == [*routing, "gate_up", "down", "finish"]


RUNTIME = (  # a function of the runtime, which of its calls fails, with what
    ("cudaSetDevice", 1, 101, "cudaErrorInvalidDevice: .* in cudaSetDevice"),
    ("cudaFuncSetAttribute", 1, 1, "cudaErrorInvalidValue: .* in gate_up"),
    ("launch", 1, 209, "cudaErrorNoKernelImageForDevice: .* in route"),
    ("launch", 2, 701, "cudaErrorLaunchOutOfResources: .* in gate_up"),
    ("launch", 3, 9, "cudaErrorInvalidConfiguration: .* in down"),
    ("launch", 4, 9, "cudaErrorInvalidConfiguration: .* in finish"),
)


@pytest.mark.parametrize("wgmma", (ANY, HOPPER))
@pytest.mark.parametrize(("function", "at", "error", "message"), RUNTIME)
def test_an_error_of_the_runtime_has_its_name_and_leaves_nothing_behind(
    function, at, error, message, wgmma
):
    call = call_of(Case("", **SIZES["small"]), torch.bfloat16, False)
    recorder = cudart.recorder()
    recorder.reset(fails=function, at=at, error=error)
    with pytest.raises(RuntimeError, match=message):
        cuda.execute(cudart.extension(), call, CHIPS[90], STREAM, wgmma=wgmma)
    assert len(recorder.launches()) == recorder.order().count("launch") - (function == "launch")
    assert recorder.order()[-1] == function  # nothing came after
    assert recorder.last_error() == 0
    check(call, CHIPS[90], wgmma)


def test_a_driver_that_refuses_a_map_is_named_before_any_launch():
    recorder = cudart.recorder()
    for at in (1, 2, 3):
        case = Case("", **SIZES["small"] | {"I": 80 + 8 * at})  # whose maps nobody has kept
        call = call_of(case, torch.bfloat16, False)
        recorder.reset(fails="cuTensorMapEncodeTiled", at=at, error=1)
        with pytest.raises(RuntimeError, match="cuTensorMapEncodeTiled fails with CUresult 1"):
            cuda.execute(cudart.extension(), call, CHIPS[90], STREAM, wgmma=True)
        assert not recorder.launches()
    check(call, CHIPS[90], HOPPER)


def test_maps_of_weights_are_made_once():
    """For each place, size and layout of them; that of inner is not kept."""
    first = call_of(Case("", T=5, K=2, E=3, H=64, I=120), torch.bfloat16, False)
    assert check(first, CHIPS[90], HOPPER).encoded == 3
    for again in (first, first._replace(top_k_weights=first.top_k_weights * 2)):
        assert check(again, CHIPS[90], HOPPER).encoded == 1
    moved = first._replace(down_proj=first.down_proj.clone())
    assert check(moved, CHIPS[90], HOPPER).encoded == 2
    other = first._replace(down_proj=torch.zeros(3, 64, 128).bfloat16()[:, :, :120])
    assert check(other, CHIPS[90], HOPPER).encoded == 2


LOOKED_UP = """
import sys
sys.path[:0] = sys.argv[1:3]
import cases, cudart, torch
from test_cuda_launch import CHIPS, SIZES, STREAM, call_of, check
from reap_kernels import cuda

call = call_of(cases.Case("", **SIZES["small"]), torch.bfloat16, False)
recorder = cudart.recorder()
for settings, wanted in (
    ({"encodes": False}, "the CUDA driver has no cuTensorMapEncodeTiled: update it"),
    ({"fails": "cudaGetDriverEntryPointByVersion", "error": 35}, "cudaErrorInsufficientDriver: "),
):
    recorder.reset(**settings)
    try:
        cuda.execute(cudart.extension(), call, CHIPS[90], STREAM, wgmma=True)
    except RuntimeError as error:
        assert str(error).startswith(wanted), error
    else:
        raise AssertionError(wanted)
    assert not recorder.launches() and not recorder.last_error()
check(call, CHIPS[90], True)
"""


def test_a_driver_without_tensor_maps():
    """In a process of its own: one that has found the entry point does not look it up again."""
    places = [str(cudart.ROOT), str(cudart.ROOT / "tests")]
    done = subprocess.run(
        [sys.executable, "-c", LOOKED_UP, *places], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_driver_older_than_the_toolkit():
    cudart.recorder().reset(fails="cudaGetDeviceCount", error=35)
    with pytest.raises(RuntimeError, match="cudaErrorInsufficientDriver: .* in cudaGetDeviceCount"):
        cudart.extension().device_count()
    assert cudart.recorder().last_error() == 0


def test_no_memory_for_the_workspace(monkeypatch):
    call = call_of(Case("", **SIZES["small"]), torch.bfloat16, False)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    cudart.recorder().reset()
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(torch.OutOfMemoryError, match="^CUDA out of memory"):
        cuda.execute(cudart.extension(), call, CHIPS[90], STREAM)
    assert cudart.recorder().order() == []


@pytest.mark.parametrize("routing", ("all_sentinels", "one_expert"))
def test_routing_changes_no_launch(routing):
    """The host reads no id."""
    case = Case("", **SIZES["small"])
    others = cases.replace(case, routing=routing)
    for wgmma in (ANY, HOPPER):
        first, second = (
            check(call_of(each, torch.bfloat16, False), CHIPS[90], wgmma) for each in (case, others)
        )
        assert first.names() == second.names()
        assert [x.grid for x in first.launches] == [x.grid for x in second.launches]


def test_on_the_current_stream_of_its_device(monkeypatch):
    """`launch` asks for the stream of the tensors' device, and changes to it only if it must."""
    asked, contexts, now = [], [], 1
    call = call_of(Case("", **SIZES["small"]), torch.bfloat16, False)
    device = SimpleNamespace(type="cuda", index=1)
    moved = call._replace(hidden_states=SimpleNamespace(device=device))

    @contextlib.contextmanager
    def on(where):
        nonlocal now
        contexts.append(where)
        before, now = now, where.index
        yield
        now = before

    def stream(where):
        asked.append(where)
        return SimpleNamespace(cuda_stream=77)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: now)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(cuda, "chip", lambda index: CHIPS[90]._replace(device=index))
    monkeypatch.setattr(cuda.native, "module", lambda name: name)
    monkeypatch.setattr(cuda, "execute", lambda *given, **options: (*given, options))
    options = {"wgmma": False, "form": "automatic"}
    wanted = ("_cuda", moved, CHIPS[90]._replace(device=1), 77, options)
    assert cuda.launch(moved, wgmma=False) == wanted and contexts == [] and asked == [device]
    now = 0
    assert cuda.launch(moved, wgmma=False) == wanted and contexts == [device] and now == 0


def meta(*shape: int, strides: tuple[int, ...] | None = None) -> torch.Tensor:
    """Of any size: there is no memory."""
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1 if strides else 0
    if strides is None:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")
    return torch.empty(reach, dtype=torch.bfloat16, device="meta").as_strided(shape, strides)


def test_sizes_past_the_limits_have_a_reason():
    def reason(**sizes):
        return cuda.unsupported_sizes(meta_call(Case("", **({"T": 1, "K": 1, "E": 1} | sizes))))

    assert reason(H=64, I=1 << 29) is None
    assert reason(H=64, I=(1 << 29) + 1) == (
        "a projection has 1073741826 rows or columns, must be at most 1073741824"
    )
    assert "1073741832 rows or columns" in reason(H=(1 << 30) + 8, I=8)
    assert reason(T=1 << 27, K=8, E=4096, H=4096, I=1024) is None
    assert reason(T=1 << 27, K=8, E=4096, H=4096, I=1 << 15) == (
        "17282764801 blocks for 1073741824 slots, at most 2147483647: pass fewer tokens at a time"
    )
    assert reason(T=1, E=4096, H=8, I=8) is None
    assert reason(T=1, E=4097, H=8, I=8) == "4097 experts, at most 4096"


@pytest.mark.parametrize(
    ("name", "shape", "strides", "reason"),
    [
        ("hidden_states", (33, 136), (1 << 31, 1), "hidden_states has strides [2147483648, 1], "
         "must reach less than 64 GB"),
        ("down_proj", (4, 136, 136), (1 << 38, 136, 1), "must reach less than 2^40 bytes"),
        ("down_proj", (4, 136, 136), (136 * 128, 128, 1), "must not overlap"),
        ("gate_up_proj", (4, 272, 136), (8, 136, 1), "must not overlap"),
        ("gate_up_proj", (4, 272, 136), (1 << 36, 136, 1), None),
        ("gate_up_proj", (4, 272, 136), (136, 4 * 136, 1), None),  # experts side by side
    ],
    ids=str,
)  # fmt: skip
def test_strides_that_no_map_can_have_are_a_reason(name, shape, strides, reason):
    call = meta_call(Case("", **SIZES["small"]))._replace(**{name: meta(*shape, strides=strides)})
    said = cuda_sm90.unsupported_layout(call)
    assert said is None if reason is None else reason in str(said)
    assert cuda.unsupported_sizes(call) is None  # the general kernels read any
    check(call, CHIPS[90], ANY)
    if reason is None:
        check(call, CHIPS[90], HOPPER)
