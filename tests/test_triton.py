"""The Triton kernels where they run: on a GPU, or in the interpreter, which needs a process of its
own (test_triton_offline.py starts it):

    TRITON_INTERPRET=1 python -m pytest tests/test_triton.py
"""

import mmap
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cases
import plain_routing
import pytest
import slotsums
import torch
from cases import Case

from bench.shapes import REAL
from reap.statistics.layerstats import LayerStatistics
from reap_kernels import moe_saliency, moe_saliency_sums, ops
from reap_kernels import triton as backend
from reap_kernels.contract import TENSORS, Call, make_call
from reap_kernels.triton import configs, order

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED:
    import interpreted

    interpreted.speed_up()
    pytestmark: list = []
else:
    pytestmark = [pytest.mark.gpu]
interpreter_only = pytest.mark.skipif(not INTERPRETED, reason="looks into the interpreter")
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.11 on
gpu_only = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")

# One dtype each, in turn; every combination is in the slow sweep.
SOME = [(case, cases.DTYPES[i % 3]) for i, case in enumerate(cases.CASES[::4])]
DETERMINISTIC = [
    (cases.SHAPES[0], torch.bfloat16),
    (cases.LAYOUTS[7], torch.float16),
    (cases.ROUTINGS[0], torch.float32),
]


@pytest.fixture(autouse=True)
def no_choice_is_remembered(monkeypatch):
    monkeypatch.setattr(backend, "_choices", {})


def run(inputs: dict, **options):
    return moe_saliency(**inputs, backend="triton", **options)


def call_of(inputs: dict, deterministic: bool = False) -> Call:
    return make_call(**inputs, deterministic=deterministic)


@pytest.mark.parametrize(("case", "dtype"), SOME, ids=str)
def test_accurate(case, dtype):
    inputs = cases.make(case, dtype, DEVICE)
    cases.assert_accurate(run(inputs), inputs)


@pytest.mark.parametrize(("case", "dtype"), DETERMINISTIC, ids=str)
def test_deterministic_combine_is_accurate(case, dtype):
    inputs = cases.make(case, dtype, DEVICE)
    cases.assert_accurate(run(inputs, deterministic=True), inputs)


@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_what_is_not_finite_stays_with_its_expert(value):
    inputs = cases.make(Case("", bias=True), torch.float32, DEVICE)
    inputs["down_bias"][2, 5] = value
    result, clean = run(inputs, deterministic=True), inputs["top_k_index"] != 2
    assert torch.equal(result.norms.isfinite(), clean)
    assert torch.equal(result.peaks.isfinite(), clean)
    assert torch.equal(result.out.isfinite().all(dim=1), clean.all(dim=1))


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", (False, True))
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_accurate_in_every_way(case, dtype, deterministic):
    inputs = cases.make(case, dtype, DEVICE)
    cases.assert_accurate(run(inputs, deterministic=deterministic), inputs)


# Rows of several tiles, of which some are not full; columns past the end of a tile.
SEVERAL_TILES = Case("several tiles", T=90, K=2, E=2, H=288, I=144, bias=True, transposed=True)
SHIPPED = {
    f"{family}-{choice.config.block_m}-{choice.bits}-{number}": (choice.config, choice.bits)
    for family, choices in configs.CHOICES.items()
    for number, choice in enumerate(choices)
    if family != "interpreter"
}
WIDEST = next(reversed([name for name in SHIPPED if name.startswith("sm_90-128")]))


@pytest.mark.parametrize(
    "name", [n if n == WIDEST else pytest.param(n, marks=pytest.mark.slow) for n in SHIPPED]
)
def test_accurate_with_shipped_tiles(name, monkeypatch):
    config, bits = SHIPPED[name]
    if not INTERPRETED:
        family = configs.family(torch.device(DEVICE))
        if family is None or not name.startswith(family):
            pytest.skip("another architecture's tiles")
    inputs = cases.make(SEVERAL_TILES, torch.float16 if bits == 16 else torch.float32, DEVICE)
    monkeypatch.setattr(configs, "choose", lambda *_: config)
    cases.assert_accurate(run(inputs), inputs)
    cases.assert_accurate(run(inputs, deterministic=True), inputs)


@pytest.mark.parametrize(("slab", "dtype"), [(1, torch.bfloat16), (2, torch.float32)], ids=str)
def test_accurate_in_slabs(slab, dtype, monkeypatch):
    """The last of them narrower than the others."""
    case = Case("", T=40, K=2, E=3, H=288, I=48, bias=True, routing="some_sentinels")
    inputs = cases.make(case, dtype, DEVICE)
    config, _ = backend.choose(call_of(inputs))
    assert config is not None
    tile = replace(config.down, block_n=64)
    monkeypatch.setattr(configs, "choose", lambda *_: replace(config, down=tile, slab=slab))
    backend._choices.clear()
    cases.assert_accurate(run(inputs), inputs)


@interpreter_only
def test_few_last_rows_are_half_a_tile(monkeypatch):
    """In tiles of 16: four of these experts' tiles hold more than eight rows, three do not."""
    rows, case = (16, 8, 17, 25, 7, 0), Case("", T=73, K=1, E=6, H=64, I=32)
    inputs = cases.make(case, torch.float32)
    ids = torch.arange(6).repeat_interleave(torch.tensor(rows))[:, None]
    inputs["top_k_index"] = ids[torch.randperm(73, generator=torch.Generator().manual_seed(1))]
    with interpreted.products(monkeypatch) as seen:
        cases.assert_accurate(run(inputs), inputs)
    products = 2 * 2 + 2  # of a row tile: gate and up in two steps along H, down in two along I
    assert seen == {16: 4 * products, 8: 3 * products}


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
def test_norms_can_be_left_out_to_see_what_they_cost(dtype):
    from reap_kernels.triton import launch

    inputs = cases.make(cases.SHAPES[4], dtype, DEVICE)
    call = call_of(inputs, deterministic=True)
    config, _ = backend.choose(call)
    assert config is not None
    without = launch.run(call, config, "without", norms=False)
    assert torch.equal(without.out, run(inputs, deterministic=True).out)


@interpreter_only
def test_their_bench_runs():
    from bench import norms
    from bench.measure import PRESETS
    from bench.shapes import TINY

    with_norms, without = norms._layer_on_gpu(
        TINY, "fp32", replace(PRESETS["smoke"], tokens=(2,), rounds=1)
    )
    assert (with_norms.impl, without.impl) == (norms.ON_GPU, norms.OFF_GPU)
    assert set(with_norms.speedup_vs) == {norms.OFF_GPU}


def same_bits(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_same_bits_in_any_order_of_programs(monkeypatch):
    case = replace(cases.ROUTINGS[0], T=40)
    inputs = cases.make(case, torch.bfloat16, DEVICE)
    first, atomic = run(inputs, deterministic=True), run(inputs)
    if INTERPRETED:
        with interpreted.backwards(monkeypatch):
            again, atomic_again = run(inputs, deterministic=True), run(inputs)
    else:
        again, atomic_again = run(inputs, deterministic=True), run(inputs)
    assert same_bits(first, again)
    assert same_bits(atomic[1:], atomic_again[1:])  # norms and peaks, in either mode
    assert same_bits(first[1:], atomic[1:])


# More than one block of slots; more than are counted at a time; in one launch and in three.
@pytest.mark.parametrize(("T", "E"), [(130, 11), (700, 31)])
@pytest.mark.parametrize("one", [True, False])
def test_routing_is_stable_and_its_tiles_cover_every_slot_once(T, E, one, monkeypatch):
    from reap_kernels.triton import routing
    from reap_kernels.triton.replay import Recorder

    monkeypatch.setattr(routing, "in_one_launch", lambda call: one)
    case = replace(cases.ROUTINGS[0], T=T, K=3, E=E)
    inputs = cases.make(case, torch.float32, DEVICE)
    expected = plain_routing.route(inputs["top_k_index"], case.E)
    for block_m in (16, 64):
        call = call_of(inputs)
        tiles = routing.route(call, block_m, Recorder(call[: len(TENSORS)]))
        assert torch.equal(tiles.order.long(), expected.order)
        assert torch.equal(tiles.offsets.long(), expected.offsets)
        number = int(tiles.first_tile[-1])
        assert number <= tiles.bound
        per_expert = tiles.tile_expert[:number].long().bincount(minlength=case.E)
        assert torch.equal(per_expert, -(-expected.counts // block_m))
        assert torch.equal(tiles.first_tile.diff().long(), per_expert)


@interpreter_only
@pytest.mark.parametrize(
    "case", [cases.SHAPES[0], cases.LAYOUTS[7], cases.STRIDES[0], cases.STRIDES[4]], ids=str
)
@pytest.mark.parametrize("deterministic", (False, True))
def test_touches_nothing_but_its_tensors(case, deterministic, monkeypatch):
    """Inputs lie between NaNs; an access outside of a kernel's arguments fails at once."""
    inputs = cases.make(case, torch.float32)
    for name, tensor in inputs.items():
        if isinstance(tensor, torch.Tensor) and case.strides == "contiguous":
            poison = torch.nan if tensor.is_floating_point() else -1
            arena = tensor.new_full((tensor.numel() + 64,), poison)
            inputs[name] = arena[32:-32].view(tensor.shape).copy_(tensor)
    with interpreted.traffic(monkeypatch) as seen:
        result = run(inputs, deterministic=deterministic)
    cases.assert_accurate(result, inputs)
    assert seen.of("gate_up_kernel", "load") and seen.of("down_kernel", "load")


def program_bytes(case: Case, counts: list[int], config: configs.Config) -> dict:
    """(kernel, argument, direction) -> bytes that programs ask for, of a gated layer in bf16: all
    but index tables. An operand tile is asked for by every program that multiplies it."""
    T, H, I, S = case.T, case.H, case.I, sum(counts)  # noqa: E741
    tiles = sum(-(-count // config.block_m) for count in counts)
    up_columns, columns = -(-I // config.gate_up.block_n), -(-H // config.down.block_n)
    partials = 4 * S * columns
    return {
        ("gate_up_kernel", "hidden_states", "load"): 2 * S * H * up_columns,
        ("gate_up_kernel", "gate_up_proj", "load"): 2 * tiles * 2 * I * H,
        ("gate_up_kernel", "inner", "store"): 2 * S * I,
        ("gate_up_kernel", "sums", "store"): 4 * T * H,
        ("down_kernel", "inner", "load"): 2 * S * I * columns,
        ("down_kernel", "down_proj", "load"): 2 * tiles * H * I,
        ("down_kernel", "combined", "atomic"): 4 * S * H,
        ("down_kernel", "squares", "store"): partials,
        ("down_kernel", "peaks", "store"): partials,
        ("finish_kernel", "squares", "load"): partials,
        ("finish_kernel", "partial_peaks", "load"): partials,
        ("finish_kernel", "norms", "store"): 4 * S,
        ("finish_kernel", "peaks", "store"): 4 * S,
        ("finish_kernel", "combined", "load"): 4 * T * H,
        ("finish_kernel", "out", "store"): 2 * T * H,
    }


@interpreter_only
def test_bytes_are_those_that_the_tiles_say(monkeypatch):
    """A scaled-down layer with several tiles in every direction."""
    case = Case("", T=96, K=2, E=3, H=160, I=96)
    inputs = cases.make(case, torch.bfloat16)
    counts = torch.bincount(inputs["top_k_index"].flatten(), minlength=case.E).tolist()
    with interpreted.traffic(monkeypatch) as seen:
        run(inputs)
    expected = program_bytes(case, counts, configs.CHOICES["interpreter"][0].config)
    assert {key: seen.bytes[key] for key in expected} == expected
    tables = {"order", "offsets", "first_tile", "tile_expert", "gates"}
    big = {"gate_up_kernel", "down_kernel", "finish_kernel"}
    others = {k for k in seen.bytes if k[0] in big and k[1] not in tables}
    assert others == set(expected), "a tensor that nobody counted"


class Cache:
    """What was used last; counts the bytes that come into it, and those written that leave it. What
    is `passing` leaves before all else."""

    def __init__(self, size: int) -> None:
        self.size, self.held, self.moved = size, 0, 0
        self.lines: dict[bool, dict[Any, tuple[int, bool]]] = {True: {}, False: {}}

    def use(self, line: Any, size: int, *, written: bool = False, passing: bool = False) -> None:
        lines = self.lines[passing]
        if lines.pop(line, None) is None:
            self.moved += size
            self.held += size
        lines[line] = size, written
        while self.held > self.size:
            self.drop()

    def drop(self) -> None:
        lines = self.lines[True] or self.lines[False]
        size, written = lines.pop(next(iter(lines)))
        self.held -= size
        self.moved += size * written


def moved(call: Call, config: configs.Config, slab: int, cache: int, together: int) -> int:
    """Bytes of down past a cache, where that many programs run at a time and share what they read
    meanwhile. In slabs the operands pass by, as EVICT says."""
    slots, programs = interpreted.tiles_in_order(call, config, slab)
    assert len({(start, column) for _, start, _, column in programs}) == len(programs)
    memory = Cache(cache)
    row, passing = 2 * call.I, slab * config.down.block_n < call.H
    for first in range(0, len(programs), together):
        wave = programs[first : first + together]
        for start in dict.fromkeys(start for _, start, _, _ in wave):
            memory.use(start, config.block_m * row, passing=passing)
        for weights in dict.fromkeys((expert, column) for expert, _, _, column in wave):
            memory.use(weights, config.down.block_n * row, passing=passing)
        for _, start, end, column in wave:
            for slot in slots[start : min(start + config.block_m, end)]:
                memory.use(("sum", slot // call.K, column), 4 * config.down.block_n, written=True)
    while memory.held:
        memory.drop()
    return memory.moved


@interpreter_only
def test_slabs_keep_the_sums_in_the_cache():
    """A layer of Qwen3-30B-A3B for 16384 tokens on an H100, all at a quarter but H and I."""
    shape, cache, together = REAL["qwen3-30b-a3b"], configs.CACHE["sm_90"] // 4, 132 // 4
    case = Case("", T=4096, K=shape.K, E=shape.E // 4, H=shape.H, I=shape.I)
    ids = cases.make(replace(case, H=8, I=8), torch.bfloat16)["top_k_index"]
    sizes = [(case.T, case.H), (case.E, 2 * case.I, case.H), (case.E, case.H, case.I)]
    x, up, down = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in sizes)
    call = Call(x, up, down, ids, ids)
    config = configs.choose(call, "sm_90", configs.SHARED_LIMIT["sm_90"], cache)
    assert config is not None and config.slab == 2
    whole, slabs = (moved(call, config, slab, cache, together) for slab in (8, 2))
    print(f"{whole / 1e6:.0f} MB expert by expert, {slabs / 1e6:.0f} MB in slabs")
    for width, found in ((2048, whole), (512, slabs)):
        assert found <= 1.2 * order.down_bytes(call, width, cache), width
    assert slabs < 0.65 * whole


@interpreter_only
def test_norms_and_peaks_cost_at_most_a_hundredth_of_the_bytes():
    """Their partial sums and themselves, of what these kernels must move at the least: weights, x,
    the inner tensor out and in, and every slot's row of the output read and written."""
    for name in ("qwen3-30b-a3b", "mixtral-8x7b", "deepseek-v3"):
        shape, T = REAL[name], 1 << 14
        S, columns = T * shape.K, -(-shape.H // 256)
        moved = shape.floor_bytes(T, "bf16") + 4 * S * shape.I + 8 * S * shape.H
        assert 4 * S * (4 * columns + 2) <= 0.01 * moved, name


@interpreter_only
def test_addresses_beyond_32_bits():
    """Strides that fit 32 bits, but not times the last expert or token."""
    far = (1 << 30) + 16
    memory = mmap.mmap(-1, 2 * (6 * far + 4096), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    arena = torch.frombuffer(memory, dtype=torch.float16)  # touched where it is used, else no page
    inputs = cases.make(Case("", T=5, K=2, E=3, H=24, I=8), torch.float16)

    def spread(name: str, strides: tuple[int, ...], start: int) -> None:
        view = arena.as_strided(inputs[name].shape, strides, start)
        inputs[name] = view.copy_(inputs[name])

    spread("gate_up_proj", (far * 3 // 2, 24, 1), 0)
    spread("down_proj", (far * 3 // 2, 8, 1), 1000)
    spread("hidden_states", (far, 1), 2000)
    cases.assert_accurate(run(inputs), inputs)


@interpreter_only
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_five_launches_and_nothing_waits(dtype, monkeypatch):
    """Every torch op and every kernel of a layer with its statistics, nothing executed."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from triton.runtime.interpreter import GridExecutor

    launches = []

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            launches.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    inputs = cases.make(Case("", bias=True), dtype)
    stats = LayerStatistics(7, gates="renormalized", pairs=True)
    stats._fused = True
    mask = torch.ones(33, dtype=torch.bool)
    call, config = call_of(inputs), configs.CHOICES["interpreter"][0].config
    from reap_kernels.triton import launch

    monkeypatch.undo()  # poisoned memory would add its fills
    monkeypatch.setattr(
        GridExecutor, "__call__", lambda self, *a, **k: launches.append(self.fn.__name__)
    )
    nothing = torch.zeros(call.top_k_index.shape)
    stats.update(call.top_k_index, call.top_k_weights, nothing, nothing, mask)  # makes the sums
    launches.clear()
    with Ops():
        result = launch.run(call, config, None)
        stats.update(call.top_k_index, call.top_k_weights, *result[1:], mask)
    free = {"new_empty", "empty", "empty_like", "transpose", "view", "detach"}
    spent = [name for name in launches if name not in free]
    assert spent == [
        "route_kernel", "gate_up_kernel", "down_kernel", "finish_kernel", "statistics_kernel"
    ]  # fmt: skip


def random_slots(g, T, K, E):
    """ids, gates, norms, peaks, mask with every kind of slot and magnitudes far apart."""
    ids = torch.randint(0, E + 2, (T, K), generator=g)
    gates = torch.randn(T, K, generator=g) * 10.0 ** torch.randint(-30, 3, (T, K), generator=g)
    gates[torch.rand(T, K, generator=g) < 0.1] = 0
    norms = torch.randn(T, K, generator=g).abs() * 10.0 ** torch.randint(
        -38, 20, (T, K), generator=g
    )
    norms[0] = 2.0**-149  # the smallest subnormal
    return ids, gates, norms, torch.rand(T, K, generator=g), torch.rand(T, generator=g) < 0.7


@pytest.mark.parametrize("gates", ("applied", "renormalized"))
@pytest.mark.parametrize(("pairs", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_statistics_have_the_bits_of_the_torch_ones(gates, pairs, dtype):
    g = torch.Generator().manual_seed(1)
    T, K, E = 150, 3, 6
    theirs = LayerStatistics(E, gates=gates, pairs=pairs)
    ours = LayerStatistics(E, gates=gates, pairs=pairs, device=DEVICE)
    ours._fused = True
    for masked in (True, False):
        *slots, mask = random_slots(g, T, K, E)
        slots[1] = slots[1].to(dtype)
        mask = mask if masked else None
        theirs.update(*slots, mask)
        ours.update(*(slot.to(DEVICE) for slot in slots), None if mask is None else mask.to(DEVICE))
    assert ours == theirs


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("gate", torch.nan), ("gate", -torch.inf), ("norm", torch.nan), ("norm", torch.inf),
        ("norm", -1.0), ("peak", torch.nan), ("peak", torch.inf), ("peak", -1.0), ("id", -3),
    ],
)  # fmt: skip
def test_statistics_count_what_cannot_be_summed(what, value):
    ids = torch.tensor([[0, 1], [1, 0]])
    slots = {
        "id": ids,
        "gate": torch.rand(2, 2),
        "norm": torch.rand(2, 2),
        "peak": torch.rand(2, 2),
    }
    slots[what][1, 0] = value
    ours = LayerStatistics(2, device=DEVICE)
    ours._fused = True
    ours.update(*(tensor.to(DEVICE) for tensor in slots.values()))
    expert = -1 if what == "id" else 1
    assert ours._faults.tolist() == [0 if i != expert % 3 else 1 for i in range(3)]
    assert ours._count.tolist() == ([2, 1] if expert else [1, 2])


@interpreter_only
def test_a_negative_id_is_refused():
    inputs = cases.make(Case(""), torch.float32)
    inputs["top_k_index"][3, 1] = -2
    with pytest.raises(ValueError, match="top_k_index holds the id -2, must be >= 0"):
        run(inputs)


@interpreter_only
def test_the_assertion_in_the_first_kernel_sees_a_negative_id(monkeypatch):
    from triton.runtime.errors import InterpreterError
    from triton.runtime.interpreter import interpreter_builder

    from reap_kernels.triton.replay import Recorder
    from reap_kernels.triton.routing import route

    inputs = cases.make(Case(""), torch.float32)
    inputs["top_k_index"][32, 2] = -1
    monkeypatch.setattr(
        interpreter_builder, "options", replace(interpreter_builder.options, debug=True)
    )
    with pytest.raises(InterpreterError, match="holds an id below 0"):
        route(call_of(inputs), 16, Recorder([inputs["top_k_index"]]))


@gpu_only
def test_a_negative_id_in_gpu_memory_fails_an_assertion():
    """In a process of its own: the CUDA context does not survive it."""
    code = (
        "import torch, cases; from reap_kernels import moe_saliency; "
        "inputs = cases.make(cases.Case(''), torch.float32, 'cuda'); "
        "inputs['top_k_index'][3, 1] = -2; moe_saliency(**inputs); torch.cuda.synchronize()"
    )
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": f"{folder.parent}{os.pathsep}{folder}"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "holds an id below 0" in done.stderr


@gpu_only
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", [Case("", bias=True), cases.LAYOUTS[7]], ids=str)
def test_later_calls_give_what_first_calls_give(case, dtype, deterministic):
    """On a GPU they are launched from a plan: with other tensors, and another call in between."""
    inputs = [cases.make(case, dtype, DEVICE, seed=seed) for seed in (1, 2)]
    other = cases.make(replace(case, T=5), dtype, DEVICE)
    for given in (*inputs, other, *inputs):
        cases.assert_accurate(run(given, deterministic=deterministic), given)


@gpu_only
def test_the_host_never_waits():
    inputs = cases.make(Case("", bias=True), torch.bfloat16, DEVICE)
    run(inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_unsupported_calls_say_why(monkeypatch):
    inputs = cases.make(Case("", E=4097, H=4, I=2), torch.float32, DEVICE)
    assert backend.unsupported(call_of(inputs)) == "4097 experts, at most 4096"
    inputs = cases.make(Case(""), torch.float64, DEVICE)
    assert backend.unsupported(call_of(inputs)) == "hidden_states has dtype float64"
    inputs = cases.make(Case(""), torch.float32, DEVICE)
    monkeypatch.setattr(configs, "shared_limit", lambda *_: 1000)
    reason = "no tile config fits 1000 bytes of shared memory"
    assert backend.unsupported(call_of(inputs)) == reason
    with pytest.raises(ValueError, match=f"cannot run this call: triton: {reason}"):
        run(inputs)
    monkeypatch.setattr(ops, "LADDER", (backend, ops.reference))
    cases.assert_accurate(moe_saliency(**inputs), inputs)  # auto moves on


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (case, cases.DTYPES[i % 3])
        for i, case in enumerate((cases.LAYOUTS[1], cases.LAYOUTS[7], cases.STRIDES[7]))
    ],
    ids=str,
)
def test_sums_over_slots(case, dtype):
    """Over more rows and columns than a program reads at a time, and tokens that do not count."""
    inputs = cases.make(cases.replace(case, T=40, E=2, K=1, H=66, I=67), dtype, DEVICE)
    weights = slotsums.weights_of(inputs)
    result = moe_saliency_sums(**inputs, sum_weights=weights, backend="triton", deterministic=True)
    slotsums.assert_accurate(result, inputs, weights)
    alone = run(inputs, deterministic=True)
    assert all(map(torch.equal, result, alone))


def test_what_weighs_nothing_is_in_no_sum():
    inputs = cases.make(Case("", T=40, K=1, E=3, bias=True), torch.float32, DEVICE)
    weights = slotsums.weights_of(inputs)
    weights[:, inputs["top_k_index"] == 1] = 0
    expected = moe_saliency_sums(**inputs, sum_weights=weights, backend="triton")
    inputs["hidden_states"][(weights == 0).all(0).all(1)] = torch.nan
    inputs["down_proj"][1], inputs["down_bias"][1] = torch.inf, torch.nan
    result = moe_saliency_sums(**inputs, sum_weights=weights, backend="triton")
    for ours, clean in zip(result[3:], expected[3:], strict=True):
        assert torch.equal(ours, clean) and ours.any() and not ours[:, 1].any()
    empty = {k: v[:0] if k in ("hidden_states", "top_k_index", "top_k_weights") else v
             for k, v in inputs.items()}  # fmt: skip
    for _ in range(2):
        nothing = moe_saliency_sums(**empty, sum_weights=weights[:, :0], backend="triton")
        assert not nothing.channel_sums.any() and not nothing.output_sums.any()
