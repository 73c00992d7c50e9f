"""The form of Hopper's kernels whose operands are swapped, csrc/cuda/sm90/swapped: what nvcc makes
of it, its source on the emulator, and mutants of it."""

import functools
import re
from collections import Counter
from typing import Any

import cases
import emulated
import mutants
import nvcc
import pytest
import sass
import torch
from cases import Case
from test_cuda_cost import H100, minimum
from test_cuda_sm90 import CASES, DTYPES, SIZES, SOURCES, needs_emulator, needs_nvcc
from test_cuda_sm90 import complaint as complaint_of
from test_cuda_sm90 import run as run_any

from bench.shapes import REAL

run = functools.partial(run_any, form="swapped")
WIDTHS = range(8, 129, 8)  # of wgmmas


@needs_emulator
@pytest.mark.parametrize(
    ("case", "dtype"), [(case, DTYPES[i % 2]) for i, case in enumerate(CASES)], ids=str
)
def test_emulated(case, dtype):
    inputs = cases.make(case, dtype)
    atomic = run(inputs, seed=1)
    slabs = run(inputs, seed=2, eager=True, deterministic=True)
    again = run(inputs, seed=3, deterministic=True)
    known = cases.truth(inputs), cases.plain(inputs)
    cases.assert_accurate(atomic, inputs, known)
    cases.assert_accurate(slabs, inputs, known)
    assert all(torch.equal(a, b) for a, b in zip(slabs, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(atomic[1:], slabs[1:], strict=True))


def rows_of_each_width() -> dict[str, Any]:
    """An expert for each width of the wgmmas, with 3 rows fewer than that."""
    experts = torch.arange(len(WIDTHS)).repeat_interleave(torch.tensor(WIDTHS) - 3)
    case = Case("widths", T=len(experts), K=1, E=len(WIDTHS), H=64, I=24)
    inputs = cases.make(case, torch.bfloat16)
    order = torch.randperm(len(experts), generator=torch.Generator().manual_seed(1))
    inputs["top_k_index"] = experts[order].view(-1, 1)
    return inputs


@needs_emulator
def test_every_width():
    inputs = rows_of_each_width()
    cases.assert_accurate(run(inputs), inputs)
    # By instructions of 16 rows by 8 columns by 16 of k: 256 rows of weights, 64 and 24 of k.
    octets = sum(width // 8 for width in WIDTHS)
    assert emulated.counters()["mma"] == octets * (256 // 16) * (64 // 16 + 64 // 16)


@needs_emulator
@pytest.mark.parametrize(
    ("T", "octets"), [(1, 1), (8, 1), (9, 2), (64, 8), (65, 9), (128, 16), (129, 17)]
)
def test_only_octets_with_a_token_are_multiplied(T, octets):
    """And of x no row is read that is not there, nor of inner, but for the last octet's."""
    run(cases.make(Case("ragged", T=T, K=1, E=1, H=128, I=128), torch.bfloat16))
    counted = emulated.counters()
    assert counted["mma"] == octets * (256 // 16) * (128 // 16 + 128 // 16)
    assert counted["global"]["hidden"]["read"] == T * 128 * 2


@needs_emulator
@pytest.mark.parametrize(
    ("activation", "layout"),
    [
        ("silu", {}),
        ("gelu", {"interleaved": True, "transposed": True}),
        ("relu", {"gated": False}),
    ],
    ids=str,
)
def test_no_bank_conflicts(activation, layout):
    """Of cp.async and of the epilogues; TMA and wgmma know the swizzle."""
    case = Case("profiled", activation=activation, **layout, **SIZES)
    run(cases.make(case, torch.bfloat16), profile=True)
    used = emulated.counters()["shared"].values()
    assert {"cp.async", "load", "store", "stmatrix"} <= {use["what"] for use in used}
    assert sum(use["conflicts"] for use in used) == 0


@needs_emulator
@pytest.mark.parametrize("T", (64, 1024, 2048))
def test_bytes_past_the_cache_are_near_the_minimum(T):
    """The layer of Qwen3 in test_cuda_cost.py at an eighth of its size, 16 of 132 processors."""
    real, cache = REAL["qwen3-30b-a3b"], H100["cache"] // 64
    case = Case("qwen3", T // 8, real.K, real.E // 8, real.H // 8, real.I // 8)
    inputs = cases.make(case, torch.bfloat16)
    chip = emulated.CHIP._replace(processors=16, cache=cache)
    run(inputs, chip=chip, cache_bytes=cache, together=chip.processors)
    moved = emulated.counters()["fetched"][-1] + emulated.counters()["written"][-1]
    least = minimum(case, len(inputs["top_k_index"].unique()), case.T)
    print(f"T={T}: {moved / 1e6:.1f} MB, {moved / least:.3f} of the minimum")
    assert moved <= 1.15 * least


@needs_emulator
def test_a_nan_stays_in_its_token():
    inputs = cases.make(Case("one NaN", **SIZES), torch.bfloat16)
    plain = run(inputs)
    inputs["hidden_states"][5, 7] = torch.nan
    for found, clean in zip(run(inputs), plain, strict=True):
        assert found[5].isnan().all()
        found[5] = clean[5]
        assert not found.isnan().any()


ALL_FILES = mutants.FILES + mutants.SM90_FILES + mutants.SUM_FILES + mutants.SWAPPED_FILES
MUTANTS = [
    mutant for mutant in mutants.find(SOURCES, ALL_FILES) if mutant.file in mutants.SWAPPED_FILES
]
# What makes no difference to any result, and why; (file, what is taken out).
EQUIVALENT = {
    (
        "sm90/swapped/tile.cuh",
        "warp == (number + 1) % BUFFERS",
    ): """all warps may wait for
        what they have sent; it takes longer""",
    ("sm90/swapped/gate_up.cuh", "row < octets * OCTET"): """more rows are filled with zeros, which
        nobody multiplies; nothing is read for them""",
    ("sm90/swapped/down.cuh", "column + OUTPUT_COLUMNS <= H"): """inside, each row is asked again
        whether it is past the last""",
}
RUNS = [
    # The ring goes round within a tile, blocks have several tiles, and the last rows are not real.
    Case("mutant", T=20, K=2, E=3, H=392, I=328),
    Case("mutant", interleaved=True, transposed=True, bias=True, **SIZES),
    Case("mutant, ungated", activation="relu", gated=False, bias=True, **SIZES),
    Case("mutant, few slots", T=5, K=1, E=3, H=72, I=72),
    # More octets than buffers, and experts of more than a tile.
    Case("mutant, many rows", T=140, K=2, E=2, H=72, I=72),
]


@pytest.fixture(scope="module")
def mutated():
    return emulated.module()


def complaint(extension, mutant: int) -> str | None:
    return complaint_of(extension, mutant, [(case, "swapped") for case in RUNS])


@needs_emulator
def test_without_a_mutant_nothing_is_wrong(mutated):
    assert complaint(mutated, 0) is None


@needs_emulator
def test_every_statement_that_waits_signals_or_fences_is_a_mutant():
    found = Counter(re.sub(r"\(.*", "", mutant.text) for mutant in MUTANTS)
    assert found.items() >= {
        "wait": 1, "fence_proxy_async": 2, "wgmma_fence": 1, "wgmma_commit": 1, "wgmma_wait<1>": 1,
        "wgmma_wait<0>": 1, "mbarrier_arrive": 2, "named_barrier": 1, "meet": 4,
        "bulk_wait_read": 5, "bulk_commit": 1, "wait_for_launch_before": 4,
    }.items()  # fmt: skip


@needs_emulator
@pytest.mark.parametrize("mutant", mutants.each(MUTANTS, EQUIVALENT))
def test_mutant_is_caught(mutated, mutant):
    found, proof = complaint(mutated, mutant.number), EQUIVALENT.get((mutant.file, mutant.text))
    assert found or proof, f"survives: {mutant}"
    assert not (found and proof), f"{found}, although {proof}"


@needs_nvcc
@pytest.mark.parametrize("name", ("gate_up_kernel", "down_kernel"))
@pytest.mark.parametrize("layout", ("false", "true"))
@pytest.mark.parametrize("dtype", ("bf16", "fp16"))
def test_machine_code(name, layout, dtype):
    """No spills; a main loop for each width, whose multiplications follow each other without a
    wait; rows leave by stmatrix and bulk copies. All else is there once, not once per width."""
    (kernel,) = (
        kernel
        for kernel in nvcc.compiled("sm_90a")
        if kernel.name == f"sm90::swapped::{name}<{dtype}, {layout}>"
    )
    assert kernel.stack == kernel.local == 0
    # 65,536 registers for 384 threads; setmaxnreg gives them out anew.
    assert kernel.registers == 168
    code = sass.instructions(kernel.code)
    text = "\n".join(code)
    assert len(code) < 6000
    assert ("tnspA" in text) == (layout == "true") and "tnspB" not in text
    gathers = name == "gate_up_kernel"
    counted = {
        r"UTMALDG\.4D": 4,
        r"LDGSTS\.E\.BYPASS\.\S*128": 8 * gathers,
        r"STSM\.16\.MT88\.2": 3 * gathers,  # ungated: two boxes
        r"UBLKCP\.G\.S": 1,
        r"UBLKRED\.G\.S\.ADD\.F32\.RN": 1 - gathers,
        r"\bREDG?\.": 0,
    }
    assert {pattern: len(re.findall(pattern, text)) for pattern in counted} == counted
    assert ("UTMALDG.2D" in text) != gathers

    suffix = ".BF16" if dtype == "bf16" else ""
    loops = sass.loops(kernel.code)
    for width in WIDTHS:
        wanted = f"HGMMA.64x{width}x16.F32{suffix} "
        loop = min((loop for loop in loops if wanted in "\n".join(loop)), key=len)
        hgmma = [i for i, each in enumerate(loop) if "HGMMA" in each]
        assert len(hgmma) == 8 and all(wanted in loop[i] for i in hgmma)
        between = "\n".join(loop[hgmma[0] : hgmma[-1]])
        assert "WARPGROUP" not in between, "ptxas runs the wgmmas one by one"
        assert ("FENCE.VIEW.ASYNC" in "\n".join(loop)) == gathers
