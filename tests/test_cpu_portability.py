"""The CPU engine beyond the processor and the compiler that it was built with, against the truth:
by g++ for aarch64, executed by an emulator; by clang++, every instruction set that runs here."""

from typing import Any

import cases
import compilers
import pytest
import torch
from emulated import call_of

from reap_kernels import native, swiglu_clamped

FEW = cases.Case("few tokens per expert", T=17, K=2, E=5, bias=True)
MANY = cases.Case("many tokens per expert", T=90, K=1, E=2, H=131, I=57, bias=True)
CLAMPED = swiglu_clamped(1.702, 0.7, 1.0)
LAYOUT: dict[str, Any] = {"interleaved": True, "transposed": True, "activation": CLAMPED}
CASES = [
    FEW,
    MANY,
    cases.replace(FEW, why="few tokens transposed", **LAYOUT),
    cases.replace(MANY, why="many tokens transposed", **LAYOUT),
    cases.replace(FEW, why="ungated", gated=False, activation="gelu"),
    cases.replace(MANY, why="interleaved", interleaved=True, activation="gelu_tanh"),
    cases.replace(FEW, why="sentinels", routing="some_sentinels", strides="stepped"),
    cases.Case("several pieces of both sizes", T=30, K=1, E=1, H=601, I=301, activation="relu2"),
    cases.Case("no token", T=0),
]


def prepare() -> None:
    """Compiles for all tests; conftest calls it while others run."""
    if compilers.missing_aarch64() is None:
        compilers.compiled_for_aarch64()
    if compilers.missing_clang() is None:
        compilers.compiled_by_clang()


clang = pytest.mark.skipif(
    compilers.missing_clang() is not None, reason=str(compilers.missing_clang())
)
aarch64 = pytest.mark.skipif(
    compilers.missing_aarch64() is not None, reason=str(compilers.missing_aarch64())
)


@aarch64
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_aarch64(case, dtype):
    inputs = cases.make(case, dtype)
    cases.assert_accurate(compilers.aarch64(call_of(inputs), threads=3), inputs)


@aarch64
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_aarch64_gives_the_same_bits_for_any_number_of_threads(dtype):
    call = call_of(cases.make(MANY, dtype))
    one, many = (compilers.aarch64(call, threads) for threads in (1, 5))
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


@aarch64
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_aarch64_lets_nan_and_infinity_through(dtype):
    """The vectors of its instruction set are a compiler's; so are their comparisons with NaN."""
    inputs = cases.make(FEW, dtype)
    inputs["hidden_states"][3, 5] = torch.nan
    inputs["down_proj"][0, 7, 2] = torch.inf
    result = compilers.aarch64(call_of(inputs), threads=2)
    hit = inputs["top_k_index"] == 0
    hit[3] = True
    for values in (result.norms, result.peaks):
        assert values[3].isnan().all()
        assert torch.equal(~values.isfinite(), hit)


@clang
@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_clang_makes_every_instruction_set():
    assert compilers.clang().available_isas() == native.module().available_isas()


@clang
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_clang(case, dtype):
    inputs = cases.make(case, dtype)
    call = native.plain(call_of(inputs), wide=True)
    for isa in compilers.clang().available_isas():
        result = native.empty(call)
        layer = native.layer(compilers.clang(), call, result, threads=3)
        compilers.clang().run_layer(layer, isa)
        cases.assert_accurate(result, inputs)
