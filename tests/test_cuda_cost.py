"""What the CUDA kernels cost, counted on the emulator: bank conflicts, launches, and the bytes that
pass a modelled L2 cache at scaled-down real layers."""

import cases
import emulated
import pytest
import torch
from cases import Case
from tiles import ALIGNED

from bench.shapes import REAL

pytestmark = pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))


@pytest.mark.parametrize("case", [*ALIGNED[1::3], cases.LAYOUTS[1]], ids=str)
def test_no_bank_conflict_anywhere(case):
    inputs = cases.make(case, torch.bfloat16)
    emulated.run(inputs, profile=True)
    shared = emulated.counters()["shared"]
    assert {line: use for line, use in shared.items() if use["conflicts"]} == {}
    kinds = {use["what"] for use in shared.values() if use["requests"]}
    assert kinds >= {"cp.async", "ldmatrix", "load", "store"}


@pytest.mark.parametrize(
    ("case", "routing"),
    [
        (Case("few slots"), ["route"]),
        (Case("most slots of one block", T=2048, K=2, E=3, H=8, I=8), ["route"]),
        (Case("many", T=2049, K=2, E=3, H=8, I=8), ["count", "scan", "place"]),
        (
            Case("many experts", T=1281, K=1, E=1100, H=8, I=8, routing="one_expert"),
            ["count", "scan", "place"],
        ),
    ],
    ids=str,
)
def test_launches(case, routing):
    """Four, or six where the slots do not fit one block; each lets the next one start beside it."""
    inputs = cases.make(case, torch.bfloat16)
    emulated.run(inputs)
    counted = emulated.counters()
    assert counted["launches"] == [*routing, "gate_up", "down", "finish"]
    # After the last comes a launch of others.
    assert counted["early"] == [True] * (len(counted["early"]) - 1) + [False]


H100 = {"cache": 50 << 20, "blocks": 264}  # bytes; two blocks on each of 132 processors


def minimum(case: Case, experts: int, touches: int) -> int:
    """Bytes that two kernels of their kind move at least. Once: the weights of the `experts` that
    were chosen and the output. Written and read: inner and the partial norms. Some for each slot. x
    is read and the fp32 sums of the output are written and read for as many rows as `touches`."""
    T, S, H, I = case.T, case.T * case.K, case.H, case.I  # noqa: E741
    weights, inner, out = experts * 3 * H * I * 2, 2 * S * I * 2, T * H * 2
    partials, slots = 2 * 8 * S * -(-H // 64), S * (8 + 4 + 4 + 4)
    return weights + inner + out + partials + slots + touches * H * (2 + 2 * 4)


# A layer and a chip at an eighth of their size: of H, I, tokens, experts and the blocks that run at
# a time, and 1/64 of the cache's bytes. Mixtral has too few experts to divide.
@pytest.mark.parametrize(
    ("name", "T", "fewer"),
    [
        ("qwen3-30b-a3b", 2048, 8),
        ("deepseek-v3", 1024, 8),
        pytest.param("mixtral-8x7b", 2048, 1, marks=pytest.mark.slow),
        ("qwen3-30b-a3b", 8192, 8),
    ],
)
def test_bytes_past_the_cache_are_near_the_minimum(name, T, fewer):
    """At most 1.15 of the minimum, where the sums fit in the cache. In the last batch they do not:
    then rows of x and of the sums are touched anew for some of the slots, for those come in the
    order of the experts, which is no order of theirs."""
    real, cache = REAL[name], H100["cache"] // 64
    case = Case(name, T // 8, real.K, real.E // fewer, real.H // 8, real.I // 8)
    inputs = cases.make(case, torch.bfloat16)
    emulated.run(
        inputs,
        chip=emulated.CHIP._replace(cache=cache),
        cache_bytes=cache,
        together=H100["blocks"] // 8,
    )
    moved = emulated.counters()["fetched"][-1] + emulated.counters()["written"][-1]
    fit = case.T * case.H * 4 <= cache
    experts = len(inputs["top_k_index"].unique())
    least = minimum(case, experts, case.T if fit else case.T * case.K)
    print(f"{name} T={T}: {moved / 1e6:.1f} MB, {moved / least:.3f} of the minimum")
    assert fit == (T < 8192) and moved <= 1.15 * least


def test_columns_in_slabs_save_bytes():
    """Of a layer whose sums do not fit the cache, unless a few columns of them come first. The
    other time the kernels are told of a cache that is not there, and take columns side by side."""
    case = Case("sums beyond the cache", T=256, K=4, E=32, H=1024, I=24)
    inputs, cache, moved = cases.make(case, torch.bfloat16), 160 << 10, []
    for told in (cache, 1 << 30):
        chip = emulated.CHIP._replace(cache=told)
        emulated.run(inputs, chip=chip, cache_bytes=cache, together=8)
        moved.append(emulated.counters()["fetched"][-1] + emulated.counters()["written"][-1])
    print(f"{moved[0] / 1e6:.1f} MB in slabs, {moved[1] / 1e6:.1f} MB side by side")
    assert moved[0] < 0.9 * moved[1]
