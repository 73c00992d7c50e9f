"""Every barrier, wait and condition of the CUDA kernels is there for a reason: without it some case
fails on the emulator, by a fault or by a wrong result."""

import functools
import re
from pathlib import Path
from typing import NamedTuple

import cases
import emulated
import mutants
import pytest
import torch
from cases import Case
from test_cuda import ROWS, same_bits

from reap_kernels import cuda

pytestmark = pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))
TRUTH, PLAIN = cases.truth, cases.plain
SOURCES = Path(__file__).parent.parent / "csrc"
# The layouts of the weights by their reasons in cases.LAYOUTS.
LAYOUTS = {case.why: case for case in cases.LAYOUTS}


def case(rows: int, layout: str, **changes) -> Case:
    found = LAYOUTS[layout]
    return cases.replace(found, **(ROWS[rows] | {"routing": "half_the_experts"} | changes))


class Run(NamedTuple):
    case: Case
    deterministic: bool = False
    sm: int = emulated.CHIP.sm
    cache: int = emulated.CHIP.cache


# The cheapest first: most mutants end there. Small sizes of a few tiles each, all of them also in
# test_cuda.py in one form or other.
RUNS = [
    Run(Case("odd", T=9, K=2, E=3, H=97, I=47, routing="some_sentinels")),
    Run(Case("odd, sums float by float", T=9, K=2, E=3, H=97, I=47), sm=80),
    Run(Case("odd biased", T=9, K=2, E=3, H=97, I=47, bias=True, interleaved=True), True),
    Run(Case("long k, fp16 gates", T=9, K=1, E=2, H=328, I=328, gates=torch.float16)),
    Run(Case("its last tile ends with the arrays", T=45, K=1, E=1, H=64, I=64)),
    Run(
        Case("more slots of a token than threads", T=1, K=130, E=2, H=8, I=8, routing="repeats"),
        True,
    ),
    Run(
        Case("int32 ids, bf16 gates", T=9, K=2, E=3, H=24, I=8, ids=torch.int32, gates=None),
    ),
    Run(Case("chunks of slots", T=700, K=2, E=5, H=8, I=8, routing="some_sentinels"), True),
    Run(Case("experts of two warps that route", T=40, K=2, E=40, H=8, I=8)),
    Run(Case("many slots", T=2080, K=2, E=12, H=8, I=8, routing="some_sentinels"), True),
    Run(Case("output in slabs, the last narrower", T=40, K=4, E=8, H=328, I=8), cache=28 << 10),
    Run(case(32, "concatenated")),
    Run(case(32, "concatenated transposed biased", routing="some_sentinels"), True),
    Run(case(32, "ungated transposed")),
    Run(case(64, "interleaved biased"), True),
    Run(case(128, "concatenated")),
]
# What makes no difference to any result, and why; (file, what is taken out).
EQUIVALENT = {
    ("combine.cuh", "column + PARTIAL_COLUMNS > args.H"): """inside, each column is asked again
        whether it is past the last""",
    ("tiles.cuh", "tile.end - tile.first <= 32"): """rows that nobody has are computed as well; they
        are counted in test_cuda.py""",
    ("tiles.cuh", "tile.end - tile.first <= 64"): "likewise",
    ("finish.cuh", "args.parts > 0"): """with 0 parts finish_slot writes zeros to norms and peaks,
        which the launch of the last slab overwrites: it comes after, and has all parts""",
}


def prepare():
    if emulated.missing() is None:
        emulated.compiled()


@pytest.fixture(scope="module")
def mutated():
    return emulated.module()


@functools.cache
def known(number: int) -> tuple[dict, cases.Saliency, cases.Saliency]:
    """The inputs of a run, the truth about it and what `plain` makes of it."""
    inputs = cases.make(RUNS[number].case, torch.bfloat16)
    return inputs, TRUTH(inputs), PLAIN(inputs)


def run(extension, number: int, mutant: int, **options):
    _, deterministic, sm, cache = RUNS[number]
    extension.configure(mutant=mutant, **options)
    call = emulated.call_of(known(number)[0], deterministic)
    chip = emulated.CHIP._replace(sm=sm, cache=cache)
    return cuda.execute(extension, call, chip, stream=0)


def complaint(extension, number: int, mutant: int, monkeypatch) -> str | None:
    """What is wrong with a mutant in that run; None if nothing is."""
    inputs, truth, plain = known(number)
    monkeypatch.setattr(cases, "truth", lambda _: truth)
    monkeypatch.setattr(cases, "plain", lambda _: plain)
    try:
        results = [
            run(extension, number, mutant, seed=seed, eager=eager)
            for seed, eager in ((1, False), (2, True))
        ]
        for result in results:
            cases.assert_accurate(result, inputs)
    except (extension.Fault, AssertionError) as error:
        return str(error).partition("\n")[0] or type(error).__name__
    stable = slice(None) if RUNS[number].deterministic else slice(1, None)
    return None if same_bits(results[0][stable], results[1][stable]) else "depends on the order"


def test_without_a_mutant_nothing_is_wrong(mutated, monkeypatch):
    for number in range(len(RUNS)):
        assert complaint(mutated, number, 0, monkeypatch) is None


def test_every_barrier_and_wait_of_the_kernels_is_a_mutant():
    """The tool against a plain search, in all files that have kernels."""
    found = [mutant.text for mutant in mutants.find(SOURCES)]
    text = "".join((SOURCES / "cuda" / file).read_text() for file in mutants.FILES)
    for name in (
        "__syncthreads()",
        "__syncwarp()",
        "cp_async_commit()",
        "is_real(first",
        "is_real(pos",
    ):
        assert sum(name in part for part in found) >= text.count(name) > 0
    waits = re.findall(r"cp_async_wait<[^;]*;", text)
    assert waits and all(found.count(wait) == 2 * waits.count(wait) for wait in waits)
    others = {path.name for path in (SOURCES / "cuda").glob("*.cuh")}
    others -= {*mutants.FILES, *mutants.SUM_FILES}
    assert others == {"ptx.cuh", "numbers.cuh", "launch.cuh"}  # no kernels


@pytest.mark.parametrize("mutant", mutants.each(mutants.find(SOURCES), EQUIVALENT))
def test_is_caught(mutant, mutated, monkeypatch):
    numbers = range(len(RUNS))
    caught = any(complaint(mutated, number, mutant.number, monkeypatch) for number in numbers)
    proof = EQUIVALENT.get((mutant.file, mutant.text))
    assert caught or proof, f"survives: {mutant}"
    assert not (caught and proof), f"caught, although {proof}"


def test_every_proof_is_about_a_mutant():
    assert set(EQUIVALENT) <= {(mutant.file, mutant.text) for mutant in mutants.find(SOURCES)}
