"""The CUDA kernels' own source, executed on the emulator in tests/simt: against the truth, in
several orders of lanes, warps and blocks, with early and late asynchronous copies. What the
emulator sees (a race, a missing wait, an access outside, a read of what nobody wrote) is an error.
test_cuda_gpu.py runs them on hardware.
"""

import mmap
from itertools import product

import cases
import emulated
import pytest
import torch
from cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from tiles import ALIGNED, LAST, ROWS

from reap_kernels import moe_saliency, swiglu_clamped

pytestmark = pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))
DTYPES = (torch.bfloat16, torch.float16)
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.11 on


def prepare():
    if emulated.missing() is None:
        emulated.compiled()


def same_bits(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check(inputs: dict, seed: int = 0, drawn: bool = False) -> None:
    """All there is to ask of a result, in both modes and two orders each."""
    atomic = emulated.run(inputs, seed=seed, eager=False)
    again = emulated.run(inputs, seed=seed + 1, eager=True)
    slabs = emulated.run(inputs, seed=seed + 2, eager=True, deterministic=True)
    slabs_again = emulated.run(inputs, seed=seed + 3, eager=False, deterministic=True)
    known = cases.truth(inputs), cases.plain(inputs)
    cases.assert_accurate(atomic, inputs, known, drawn=drawn)
    cases.assert_accurate(slabs, inputs, known, drawn=drawn)
    assert same_bits(slabs, slabs_again)
    for other in (again, slabs):
        assert same_bits(atomic[1:], other[1:]), "norms or peaks depend on the order"


# One dtype each, in turn, and in the slow tests the other.
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, DTYPES[i % 2]) for i, case in enumerate(cases.CASES)]
    + [
        pytest.param(case, DTYPES[1 - i % 2], marks=pytest.mark.slow)
        for i, case in enumerate(cases.CASES)
    ],
    ids=str,
)
def test_contract(case, dtype):
    check(cases.make(case, dtype))


@pytest.mark.parametrize(
    ("case", "dtype"), [(case, DTYPES[i % 2]) for i, case in enumerate(ALIGNED + LAST)], ids=str
)
def test_every_tile(case, dtype):
    check(cases.make(case, dtype), seed=7)


def rows_multiplied(slots: int, rows: int) -> int:
    """Of an expert, in tiles of `rows`."""
    full, left = divmod(slots, rows)
    sizes = (32, 64, 128) if rows == 128 else (rows,)
    return full * rows + (left and min(size for size in sizes if size >= left))


def test_tiles_are_those_that_the_cases_are_for():
    """By the instructions that were executed: 16 rows by 8 columns by 16 of k each."""
    for rows, sizes in ROWS.items():
        case = Case("", routing="half_the_experts", **sizes)
        inputs = cases.make(case, torch.bfloat16)
        emulated.run(inputs)
        _, counts = inputs["top_k_index"].unique(return_counts=True)
        multiplied = sum(rows_multiplied(count, rows) for count in counts.tolist())
        assert max(counts) > rows
        up_tiles, up_steps = -(-2 * case.I // 128), -(-case.H // 64)
        down_tiles, down_steps = -(-case.H // 128), -(-case.I // 64)
        work = multiplied * (up_tiles * up_steps + down_tiles * down_steps)
        assert emulated.counters()["mma"] == work // 16 * 16 * 4


@pytest.mark.parametrize("left", (1, 32, 33, 64, 65, 127, 128, 129))
@pytest.mark.parametrize("transposed", (False, True))
def test_what_an_expert_does_not_fill_is_not_multiplied(left, transposed):
    """Of tiles of 128 rows: a quarter or a half where no more are left. The other expert has enough
    rows for such tiles, and one in its last."""
    case = Case("", T=left + 257, K=1, E=2, H=64, I=64, transposed=transposed)
    inputs = cases.make(case, torch.bfloat16)
    inputs["top_k_index"] = (torch.arange(case.T) < left).long().reshape(-1, 1)
    check(inputs)
    rows = rows_multiplied(left, 128) + 2 * 128 + 32
    assert emulated.counters()["mma"] == rows // 16 * 16 * (64 // 16) * 2


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 90),
    K=st.integers(1, 4),
    E=st.integers(1, 9),
    H=st.one_of(st.integers(1, 150), st.integers(1, 30).map(lambda n: 8 * n)),
    I=st.one_of(st.integers(1, 150), st.integers(1, 20).map(lambda n: 8 * n)),
    layout=st.sampled_from(cases.LAYOUTS),
    strides=st.sampled_from(("contiguous", "contiguous", "stepped", "permuted", "broadcast")),
    routing=st.sampled_from(("some_sentinels", "one_expert", "repeats", "top_k", "all_sentinels")),
    activation=st.sampled_from(("silu", "gelu", "relu2", swiglu_clamped(1.702, 0.7, 1.0))),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_sweep(T, K, E, H, I, layout, strides, routing, activation, dtype, seed):  # noqa: E741
    if not layout.gated and activation.startswith("swiglu"):
        activation = "gelu_tanh"
    K = min(K, E)
    sizes = {"T": T, "K": K, "E": E, "H": H, "I": I}
    options = {"strides": strides, "routing": routing, "activation": activation}
    check(cases.make(cases.replace(layout, **sizes, **options), dtype, seed=seed), seed, drawn=True)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (ALIGNED[1], torch.bfloat16),
        (ALIGNED[14], torch.float16),
        (ALIGNED[27], torch.bfloat16),
        (cases.LAYOUTS[1], torch.float16),
    ],
    ids=str,
)
def test_same_bits_in_any_order(case, dtype):
    inputs = cases.make(case, dtype)
    first = emulated.run(inputs, deterministic=True)
    for seed, eager in product(range(1, 6), (False, True)):
        again = emulated.run(inputs, deterministic=True, seed=seed, eager=eager)
        assert same_bits(first, again), (seed, eager)


def test_slabs_of_a_deterministic_call_add_up():
    """More slabs than one, of which the last is narrower."""
    inputs = cases.make(Case("", T=40, K=2, E=4, H=328, I=64, bias=True), torch.bfloat16)
    result = emulated.run(inputs, deterministic=True)
    assert emulated.counters()["launches"].count("down") == 3
    cases.assert_accurate(result, inputs)


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("deterministic", (False, True))
def test_what_is_not_finite_stays_with_its_expert(bad, dtype, deterministic):
    """One bad weight of `down` is in the slots of its expert, and nowhere else."""
    inputs = cases.make(ALIGNED[1], dtype)
    inputs["down_proj"][2, 50, 3] = bad
    result = emulated.run(inputs, deterministic=deterministic)
    hit = inputs["top_k_index"] == 2
    for values in (result.norms, result.peaks):
        assert values[~hit].isfinite().all() and not values[hit].isfinite().any()
        if bad != bad:
            assert values[hit].isnan().all()
    assert result.out[~hit.any(dim=1)].isfinite().all()
    assert not result.out[hit.any(dim=1), 50].isfinite().any()


def test_nan_goes_through_every_activation():
    for activation in ("silu", "gelu", "gelu_tanh", "relu", "relu2", swiglu_clamped(1.0, 0.5, 0.0)):
        inputs = cases.make(Case("", T=5, activation=activation), torch.bfloat16)
        inputs["hidden_states"][3, 4] = torch.nan
        result = emulated.run(inputs)
        assert result.norms.isnan().any(dim=1).tolist() == [False, False, False, True, False]
        assert result.peaks.isnan().all(dim=1).tolist() == [False, False, False, True, False]


def test_memory_that_no_16_byte_copy_could_read():
    """Operands that begin one element into their memory, as tensors in a safetensors file may."""
    inputs = cases.make(ALIGNED[1], torch.bfloat16)
    for name in ("gate_up_proj", "down_proj", "hidden_states", "gate_up_bias", "down_bias"):
        tensor = inputs[name]
        memory = torch.empty(tensor.numel() + 65, dtype=tensor.dtype)
        start = 1 + (-memory.data_ptr() % 64) // 2
        inputs[name] = memory[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
        assert inputs[name].data_ptr() % 16 == 2
    check(inputs)


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("width", (24, 23))
def test_addresses_beyond_32_bits(transposed, width):
    """Strides that fit 32 bits, but not times the last expert or token."""
    far = (1 << 30) + 16
    case = Case("", T=5, K=2, E=3, H=width, I=8, transposed=transposed)
    inputs = cases.make(case, torch.float16)

    def spread(name: str, strides: tuple[int, ...]) -> None:
        size = 2 * (strides[0] * len(inputs[name]) + 4096)
        pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
        memory = torch.frombuffer(pages, dtype=torch.float16)  # no page but where it is used
        inputs[name] = memory.as_strided(inputs[name].shape, strides).copy_(inputs[name])

    spread("gate_up_proj", (far * 3 // 2, 24, 1))
    spread("down_proj", (far * 3 // 2, 24 if transposed else 8, 1))
    spread("hidden_states", (far, 1))
    check(inputs)


def test_a_negative_id_traps():
    inputs = cases.make(cases.SHAPES[0], torch.bfloat16)
    inputs["top_k_index"][3, 1] = -2
    with pytest.raises(emulated.fault(), match=r"^trap at routing\.cuh:\d+"):
        emulated.run(inputs)


def test_many_experts_and_many_slots():
    """Experts by the thousand, and more chunks of slots than lanes that scan them."""
    inputs = cases.make(Case("", T=7, K=2, E=1100, H=8, I=8), torch.bfloat16)
    cases.assert_accurate(emulated.run(inputs), inputs)
    inputs = cases.make(Case("", T=9000, K=2, E=3, H=8, I=8, routing="repeats"), torch.float16)
    result = emulated.run(inputs, deterministic=True)
    exact = moe_saliency(**{k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
                            for k, v in inputs.items()}, backend="reference")  # fmt: skip
    for ours, truth in zip(result, exact, strict=True):
        assert (ours.double() - truth).abs().max() <= 2.0**-10 * truth.abs().max()
