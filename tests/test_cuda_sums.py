"""csrc/cuda/sums.cuh on the emulator, behind both sets of GEMM kernels, and its mutants."""

from pathlib import Path

import cases
import emulated
import mutants
import pytest
import slotsums
import torch
from cases import Case
from test_cuda_sm90 import CASES as ALIGNED
from test_cuda_sm90 import CHIP, SHARED
from tiles import LAST

from reap_kernels import Summed, cuda

pytestmark = pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))
SOURCES = Path(__file__).parent.parent / "csrc"
DTYPES = (torch.bfloat16, torch.float16)
# More rows of an expert than a piece of each warp, and more rows of the weights than threads.
LONG = Case("several pieces", T=150, K=2, E=2, H=264, I=24, bias=True)
ODD = [
    *cases.SHAPES[:2],
    *(cases.LAYOUTS[1], cases.LAYOUTS[7]),
    *cases.ROUTINGS[:2],
    *cases.STRIDES[:2],
]
# Both places of gate and up, padding, and sizes of one.
HOPPER = [*ALIGNED[1:8:2], *ALIGNED[14:16]]


def prepare():
    if emulated.missing() is None:
        emulated.compiled()


def run(inputs: dict, weights, *, wgmma: bool = False, **options) -> Summed:
    module = emulated.module()
    module.configure(shared_limit=SHARED, **options)
    call = emulated.call_of(inputs | {"sum_weights": weights})
    result = cuda.execute(module, call, CHIP, stream=0, wgmma=wgmma)
    assert isinstance(result, Summed)
    return result


@pytest.mark.parametrize(
    ("case", "dtype", "wgmma"),
    [(case, DTYPES[i % 2], False) for i, case in enumerate([*ODD, *LAST[1:], LONG])]
    + [(case, DTYPES[i % 2], True) for i, case in enumerate([*HOPPER, LONG])],
    ids=str,
)
def test_emulated(case, dtype, wgmma):
    inputs = cases.make(case, dtype)
    weights = slotsums.weights_of(inputs)
    result = run(inputs, weights, wgmma=wgmma, seed=1)
    slotsums.assert_accurate(result, inputs, weights)
    again = run(inputs, weights, wgmma=wgmma, seed=2, eager=True)
    assert all(map(torch.equal, result[1:], again[1:])), "the order shows"
    launches = emulated.counters()["launches"]
    assert emulated.counters()["early"] == [name != "finish" for name in launches]
    place = launches.index("gate_up")
    assert launches[place : place + 4] == ["gate_up", "sum", "project", "down"]


def test_no_launch_where_no_sums_are_asked_for():
    emulated.run(cases.make(LONG, torch.bfloat16))
    assert {"sum", "project"}.isdisjoint(emulated.counters()["launches"])


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("wgmma", (False, True))
def test_what_weighs_nothing_is_left_out(wgmma, transposed):
    """Tokens of NaN, and an expert without a token that counts, whose weights are no numbers."""
    inputs = cases.make(cases.replace(LONG, E=3, transposed=transposed), torch.bfloat16)
    inputs["top_k_index"][::3, 0] = 2
    weights = slotsums.weights_of(inputs)
    weights[:, inputs["top_k_index"] == 2] = 0
    expected = run(inputs, weights, wgmma=wgmma)
    inputs["hidden_states"][(weights == 0).all(0).all(1)] = torch.nan
    inputs["down_proj"][2], inputs["down_bias"][2] = torch.inf, torch.nan
    result = run(inputs, weights, wgmma=wgmma)
    for ours, clean in zip(result[3:], expected[3:], strict=True):
        assert torch.equal(ours, clean) and not ours[:, 2].any() and ours[:, :2].any()


def test_no_token():
    inputs = cases.make(cases.replace(LONG, T=0), torch.bfloat16)
    result = run(inputs, torch.zeros(2, 0, 2))
    assert not result.channel_sums.any() and not result.output_sums.any()


def test_bank_conflicts_are_those_of_eight_bytes():
    """A warp's doubles take two wavefronts, which the profile counts as one conflict each."""
    inputs = cases.make(LONG, torch.bfloat16)
    run(inputs, slotsums.weights_of(inputs), profile=True)
    used = emulated.counters()["shared"]
    ours = [use for line, use in used.items() if "sums.cuh" in line]
    assert ours and all(use["wavefronts"] == 2 * use["requests"] for use in ours)


# Of 64 columns some are not there, some rows of the weights neither; experts have no slot, few, or
# more than a piece of every warp; weights are K-major and otherwise.
RUNS = [
    Case("odd", T=9, K=2, E=3, H=97, I=47, routing="some_sentinels", bias=True),
    Case("aligned", T=9, K=2, E=3, H=104, I=72, routing="half_the_experts", bias=True),
    Case("several pieces and blocks", T=150, K=1, E=1, H=264, I=328),
    Case("rows beyond the threads", T=5, K=1, E=2, H=260, I=65, transposed=True),
]


@pytest.fixture(scope="module")
def known():
    found = []
    for case in RUNS:
        inputs = cases.make(case, torch.bfloat16)
        weights = slotsums.weights_of(inputs)
        found.append((inputs, weights, slotsums.truth(inputs, weights)))
    return found


def complaint(mutant: int, known, monkeypatch) -> str | None:
    for inputs, weights, truth in known:
        monkeypatch.setattr(slotsums, "truth", lambda *_, truth=truth: truth)
        try:
            for seed, eager in ((1, False), (2, True)):
                result = run(inputs, weights, mutant=mutant, seed=seed, eager=eager)
                slotsums.assert_accurate(result, inputs, weights)
        except (emulated.fault(), AssertionError) as error:
            return str(error).partition("\n")[0] or type(error).__name__
    return None


def test_without_a_mutant_nothing_is_wrong(known, monkeypatch):
    assert complaint(0, known, monkeypatch) is None


FOUND = [
    mutant
    for mutant in mutants.find(SOURCES, mutants.FILES + mutants.SM90_FILES + mutants.SUM_FILES)
    if mutant.file in mutants.SUM_FILES
]


@pytest.mark.parametrize("mutant", FOUND, ids=lambda mutant: f"{mutant.line}-{mutant.text}")
def test_every_barrier_and_condition_is_there_for_a_reason(mutant, known, monkeypatch):
    assert complaint(mutant.number, known, monkeypatch), f"survives: {mutant}"
