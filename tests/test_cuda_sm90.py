"""The kernels for Hopper in csrc/cuda/sm90: what nvcc makes of them, their source on the emulator,
and mutants of it."""

import functools
import re
from collections import Counter
from itertools import product
from pathlib import Path
from types import SimpleNamespace
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

from bench.shapes import REAL
from reap_kernels import cuda, cuda_sm90, moe_saliency, native, ops, swiglu_clamped

needs_nvcc = pytest.mark.skipif(nvcc.missing() is not None, reason=str(nvcc.missing()))
needs_emulator = pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))
SOURCES = Path(__file__).parent.parent / "csrc"
SHARED = 227 << 10  # of a block on an sm_90 [bytes]
DTYPES = (torch.bfloat16, torch.float16)
COLUMNS = {"cooperative": 256, "pingpong": 192}  # of down's tiles in each form
FORMS = tuple(COLUMNS)

# Two tiles of columns, the second nearly empty; slices of k that end early.
SIZES: dict[str, Any] = {"T": 33, "K": 3, "E": 4, "H": 136, "I": 136}
CASES = (
    [
        Case(
            layout.why,
            gated=layout.gated,
            interleaved=layout.interleaved,
            transposed=layout.transposed,
            bias=layout.bias,
            routing="some_sentinels" if layout.bias else "half_the_experts",
            **SIZES,
        )
        for layout in cases.LAYOUTS
    ]
    + [
        Case("full tiles and one row more", T=129, K=1, E=1, H=256, I=128),
        Case("more stages than the ring has, several tiles per block", T=24, E=5, H=456, I=328),
        Case("whole tiles, half ones and both in turn", T=300, K=1, E=2, H=456, I=72),
        Case("one of everything", T=1, K=1, E=1, H=8, I=8, gated=False),
        Case(
            "an inner size that is padded",
            T=9,
            E=4,
            H=72,
            I=36,
            interleaved=True,
            transposed=True,
            gates=None,
        ),
        Case("nobody has an expert", routing="all_sentinels", **SIZES),
        Case("gates in the model dtype", gates=None, ids=torch.int32, **SIZES),
        # Gated swish is computed in registers, what these have is not.
        Case("gelu", activation="gelu", **SIZES),
        Case("relu2 interleaved", activation="relu2", interleaved=True, bias=True, **SIZES),
    ]
    + [
        Case(
            f"clamped swish{' interleaved' * interleaved}",
            activation=swiglu_clamped(1.702, 0.7, 1.0),
            interleaved=interleaved,
            bias=True,
            **SIZES,
        )
        for interleaved in (False, True)
    ]
)


# Few enough that a block has several tiles.
CHIP = emulated.CHIP._replace(processors=3)


def run(inputs, module=None, *, deterministic=False, chip=CHIP, form="automatic", **options):
    module = module or emulated.module()
    module.configure(shared_limit=SHARED, **options)
    call = emulated.call_of(inputs, deterministic)
    return cuda.execute(module, call, chip, stream=0, wgmma=True, form=form)


@needs_emulator
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("case", "dtype"), [(case, DTYPES[i % 2]) for i, case in enumerate(CASES)], ids=str
)
def test_emulated(case, dtype, form):
    inputs = cases.make(case, dtype)
    atomic = run(inputs, form=form, seed=1)
    assert "gate_up" in emulated.counters()["launches"]
    slabs = run(inputs, form=form, seed=2, eager=True, deterministic=True)
    again = run(inputs, form=form, seed=3, deterministic=True)
    known = cases.truth(inputs), cases.plain(inputs)
    cases.assert_accurate(atomic, inputs, known)
    cases.assert_accurate(slabs, inputs, known)
    assert all(torch.equal(a, b) for a, b in zip(slabs, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(atomic[1:], slabs[1:], strict=True))


@needs_emulator
@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize(("activation", "form"), [("silu", FORMS[0]), ("gelu", FORMS[1])])
def test_no_bank_conflicts(activation, form, interleaved):
    """Of cp.async and of the epilogues; TMA and wgmma know the swizzle."""
    layout = {"interleaved": interleaved, "transposed": interleaved}
    case = Case("profiled", activation=activation, **layout, **SIZES)
    run(cases.make(case, torch.bfloat16), form=form, profile=True)
    used = emulated.counters()["shared"].values()
    assert {"cp.async", "load", "store"} <= {use["what"] for use in used}
    assert sum(use["conflicts"] for use in used) == 0


@needs_emulator
@pytest.mark.parametrize(
    ("name", "T", "fewer", "form"),
    [
        ("qwen3-30b-a3b", 2048, 8, "cooperative"),
        ("qwen3-30b-a3b", 2048, 8, "pingpong"),
        pytest.param("mixtral-8x7b", 2048, 1, "automatic", marks=pytest.mark.slow),
        pytest.param("deepseek-v3", 1024, 8, "automatic", marks=pytest.mark.slow),
    ],
)
def test_bytes_past_the_cache_are_near_the_minimum(name, T, fewer, form):
    """The layers of test_cuda_cost.py at an eighth of their size, and 16 of 132 processors."""
    real, cache = REAL[name], H100["cache"] // 64
    case = Case(name, T // 8, real.K, real.E // fewer, real.H // 8, real.I // 8)
    inputs = cases.make(case, torch.bfloat16)
    chip = emulated.CHIP._replace(processors=16, cache=cache)
    run(inputs, chip=chip, form=form, cache_bytes=cache, together=chip.processors)
    moved = emulated.counters()["fetched"][-1] + emulated.counters()["written"][-1]
    least = minimum(case, len(inputs["top_k_index"].unique()), case.T)
    print(f"{name} T={T}: {moved / 1e6:.1f} MB, {moved / least:.3f} of the minimum")
    assert moved <= 1.15 * least


@needs_emulator
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("T", "groups"), [(40, 1), (64, 1), (65, 2), (128, 2), (129, 3), (193, 4)])
def test_what_an_expert_does_not_fill_is_not_multiplied(T, groups, form):
    """Of its last tile, at most 64 rows are one group of 64 and not two: counted by instructions
    of 16 rows by 8 columns by 16 of k, and by the rows of x that are read, 64 for each group."""
    case = Case("ragged", T=T, K=1, E=1, H=128, I=128)
    run(cases.make(case, torch.bfloat16), form=form)
    counted = emulated.counters()
    columns = 256 + COLUMNS[form]  # of gate_up's tile and of down's
    assert counted["mma"] == groups * (64 // 16) * (columns // 8) * (128 // 16)
    assert counted["global"]["hidden"]["read"] == groups * 64 * 128 * 2


@needs_emulator
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("T", "deterministic"), [(8, False), (8, True), (260, False), (3, False)])
def test_hints_are_for_what_a_block_loads_first(T, deterministic, form):
    """Where all experts have as many slots, and none where some can have too few: for up to four
    stages of boxes of 8 KB each, of a block's first tile in gate_up and in down."""
    inputs = cases.make(Case("even", T=T, K=1, E=2, H=392, I=136), torch.bfloat16)
    inputs["top_k_index"] = torch.arange(T).remainder(2).reshape(T, 1)
    run(inputs, form=form, deterministic=deterministic)
    counted = emulated.counters()
    slabs = counted["launches"].count("down")
    assert slabs == (-(-392 // COLUMNS[form]) if deterministic else 1)
    stages = 2 * 3 * slabs if deterministic else 3 * 3  # of down, of two experts or three blocks
    boxes = 3 * 4 * 4 + stages * COLUMNS[form] // 64
    assert counted["hinted"] == counted["met"] == (T > 3) * boxes * 8192


@needs_emulator
@pytest.mark.parametrize("form", FORMS)
def test_a_nan_stays_in_its_token(form):
    inputs = cases.make(Case("one NaN", **SIZES), torch.bfloat16)
    plain = run(inputs, form=form)
    inputs["hidden_states"][5, 7] = torch.nan
    out, norms, peaks = run(inputs, form=form)
    for found, clean in zip((out, norms, peaks), plain, strict=True):
        assert found[5].isnan().all()
        found[5] = clean[5]
        assert not found.isnan().any()


MUTANTS = [
    mutant
    for mutant in mutants.find(SOURCES, mutants.FILES + mutants.SM90_FILES)
    if mutant.file in mutants.SM90_FILES
]
# What makes no difference to any result, and why; (file, what is taken out).
EQUIVALENT = {
    ("sm90/gate_up.cuh", "both"): """rows of x that nobody multiplies may be copied as well; they
        are counted in test_what_an_expert_does_not_fill_is_not_multiplied""",
}
# The ring goes round within a tile, blocks have several tiles, and the last rows are not real.
DEEP: dict[str, Any] = {"T": 20, "K": 2, "E": 3, "H": 392, "I": 328}
RUNS = [
    (Case("mutant", **DEEP), "cooperative"),
    (Case("mutant", interleaved=True, transposed=True, bias=True, **SIZES), "cooperative"),
    (Case("mutant, staged in fp32", activation="gelu", **SIZES), "cooperative"),
    (Case("mutant, few slots", T=5, K=1, E=3, H=72, I=72), "cooperative"),
    # The end is said with the stage that the last tile began with.
    (Case("mutant, as many slices as stages", T=9, K=2, E=3, H=256, I=256), "cooperative"),
    (Case("mutant, an expert of two tiles", T=140, K=1, E=1, H=72, I=72), "cooperative"),
    (Case("mutant", **DEEP), "pingpong"),
    (Case("mutant, half tiles after whole ones", T=150, K=1, E=1, H=392, I=72), "pingpong"),
]


@pytest.fixture(scope="module")
def mutated():
    return emulated.module()


@functools.cache
def known(case: Case) -> tuple[dict, tuple[cases.Saliency, cases.Saliency]]:
    """The inputs of a run, the truth about it and what `plain` makes of it."""
    inputs = cases.make(case, torch.bfloat16)
    return inputs, (cases.truth(inputs), cases.plain(inputs))


@functools.cache
def hinted(case: Case, form: str) -> int:
    """Bytes that hints are for, where nothing is out of order."""
    run(known(case)[0], form=form)
    return emulated.counters()["hinted"]


def complaint(extension, mutant: int, runs=RUNS) -> str | None:
    """`runs`: cases with their forms."""
    for (case, form), seed in product(runs, range(4)):
        inputs, answers = known(case)
        options = {"form": form, "seed": seed, "eager": seed % 2 == 1, "mutant": mutant}
        try:
            cases.assert_accurate(run(inputs, extension, **options), inputs, answers)
        except (extension.Fault, AssertionError) as error:
            return str(error)
        if extension.counters()["hinted"] != hinted(case, form):
            return "other hints"
    return None


@needs_emulator
def test_without_a_mutant_nothing_is_wrong(mutated):
    assert complaint(mutated, 0) is None


@needs_emulator
def test_every_statement_that_waits_signals_or_fences_is_a_mutant():
    found = Counter(re.sub(r"\(.*", "", mutant.text) for mutant in MUTANTS)
    assert found.items() >= {
        "wait": 5, "wait_empty": 5, "drain": 1, "fence_mbarrier_init": 1, "fence_proxy_async": 3,
        "wgmma_fence": 1, "wgmma_commit": 1, "wgmma_wait<1>": 1, "wgmma_wait<0>": 1,
        "mbarrier_arrive": 7, "mbarrier_arrive_expect": 2, "cp_async_mbarrier_arrive": 1,
        "__syncthreads": 1, "__syncwarp": 6, "bulk_wait_read": 5, "bulk_commit": 2,
        "named_barrier": 1, "wait_for_launch_before": 6, "pass_over": 4,
    }.items()  # fmt: skip


@needs_emulator
@pytest.mark.parametrize("mutant", mutants.each(MUTANTS, EQUIVALENT))
def test_mutant_is_caught(mutated, mutant):
    found, proof = complaint(mutated, mutant.number), EQUIVALENT.get((mutant.file, mutant.text))
    assert found or proof, f"survives: {mutant}"
    assert not (found and proof), f"{found}, although {proof}"


@needs_nvcc
@pytest.mark.parametrize("name", ("gate_up_kernel", "down_kernel", "down_pingpong_kernel"))
@pytest.mark.parametrize("layout", ("false", "true"))
@pytest.mark.parametrize("dtype", ("bf16", "fp16"))
def test_machine_code(name, layout, dtype):
    """No spills, and Hopper's instructions: multiplications that follow each other without a wait,
    TMA, mbarriers; rows of x by cp.async alone."""
    (kernel,) = (
        kernel
        for kernel in nvcc.compiled("sm_90a")
        if kernel.name == f"sm90::{name}<{dtype}, {layout}>"
    )
    assert kernel.stack == kernel.local == 0
    # 65,536 registers for 384 threads; setmaxnreg gives them out anew.
    assert kernel.registers == 168
    code = sass.instructions(kernel.code)
    text = "\n".join(code)
    suffix = ".BF16" if dtype == "bf16" else ""
    # In turns: tiles of two groups of 64 rows, and the loop for those of one.
    shape, products, boxes = (
        ("64x192x16", 3, 3) if name == "down_pingpong_kernel" else ("64x256x16", 1, 4)
    )
    assert len(re.findall(rf"HGMMA\.{shape}\.F32{suffix} ", text)) == 4 * products
    assert not re.search(r"\bHMMA", text)
    assert ("tnspB" in text) == (layout == "true")
    assert len(re.findall(r"UTMALDG\.4D", text)) == boxes
    assert ("UTMALDG.2D" in text) == (name != "gate_up_kernel")
    assert len(re.findall(r"LDGSTS\.E\.BYPASS\.\S*128", text)) == (
        8 if name == "gate_up_kernel" else 0
    )
    assert len(re.findall(r"ARRIVES\.LDGSTSBAR", text)) == (name == "gate_up_kernel")
    # Rows leave by bulk copies: of inner whole, of y in strips and two modes.
    copied, added = (1, 0) if name == "gate_up_kernel" else (products * boxes, products * boxes)
    assert len(re.findall(r"UBLKCP\.G\.S", text)) == copied
    assert len(re.findall(r"UBLKRED\.G\.S\.ADD\.F32\.RN", text)) == added
    assert not re.search(r"\bREDG?\.", text)
    # Hints before the wait: for the boxes of one stage at a time, and for the maps.
    assert len(re.findall(r"UTMAPF\.L2\.4D", text)) == boxes
    assert len(re.findall(r"UTMACCTL\.PF", text)) == (1 if name == "gate_up_kernel" else 2)
    assert len(re.findall(r"\bATOMG\.E\.ADD", text)) == 1  # the counter of tiles
    for instruction in ("SYNCS.EXCH", "SYNCS.PHASECHK.TRANS64.TRYWAIT", "SYNCS.ARRIVE.TRANS64",
                        "USETMAXREG.DEALLOC", "USETMAXREG.TRY_ALLOC"):  # fmt: skip
        assert instruction in text, instruction

    # A turn is given when the loop is over, before its last products are waited for.
    straight = r"(?:(?!.*BRA).*\n)*?"
    given = rf"BRA .*\n{straight}.*SYNCS\.ARRIVE.*\n{straight}.*DEPBAR\.LE gsb0, 0x0"
    assert len(re.findall(given, text)) == (2 if name == "down_pingpong_kernel" else 0)

    loops = sass.inner_loops(kernel.code)
    hgmma = [[i for i, each in enumerate(loop) if "HGMMA" in each] for loop in loops]
    wanted = [4, 8] if name == "down_pingpong_kernel" else [4]
    assert sorted(map(len, hgmma)) == wanted
    for loop, places in zip(loops, hgmma, strict=True):
        between = "\n".join(loop[places[0] : places[-1]])
        assert "WARPGROUP" not in between, "ptxas runs the wgmmas one by one"
        assert ("FENCE.VIEW.ASYNC" in "\n".join(loop)) == (name == "gate_up_kernel")


def test_it_says_why_it_is_missing(monkeypatch):
    assert ops.named("cuda_sm90") == (cuda_sm90,)
    inputs = cases.make(Case("aligned", **SIZES), torch.bfloat16)
    monkeypatch.setattr(cuda, "available", lambda: "no GPU today")
    with pytest.raises(ValueError, match="cuda_sm90: no GPU today"):
        moe_saliency(**inputs, backend="cuda_sm90")


def test_needs_its_own_chip_and_machine_code(monkeypatch):
    monkeypatch.setattr(cuda, "available", lambda: None)
    built = "sm_80 sm_90a compute_90"
    monkeypatch.setattr(native, "module", lambda name: SimpleNamespace(architectures=built))
    assert cuda_sm90.available() is None
    built = "sm_80 compute_90"
    assert cuda_sm90.available() == "the extension is built for sm_80 compute_90, not sm_90a"

    call = emulated.call_of(cases.make(Case("fits", **SIZES), torch.bfloat16))
    monkeypatch.setattr(cuda, "unsupported", lambda call: None)
    sm = 90
    monkeypatch.setattr(cuda, "chip", lambda device: emulated.CHIP._replace(sm=sm))
    assert cuda_sm90.unsupported(call) is None
    sm = 100
    assert cuda_sm90.unsupported(call) == "the GPU is an sm_100, must be an sm_90"


@pytest.mark.parametrize("built", ["sm_80 sm_90a compute_90", "sm_80", "sm_90a", None])
@pytest.mark.parametrize(
    ("chips", "reason"),
    [
        ([(8, 0)], "the GPU is an sm_80, must be an sm_90"),
        ([(12, 0), (8, 6), (8, 6)], "the GPU is an sm_86 and sm_120, must be an sm_90"),
        ([(8, 0), (9, 0)], None),
    ],
)
def test_another_gpu_is_the_reason_whatever_is_built(
    monkeypatch, request, built: Any, chips, reason
):
    """Not that nothing is built for its chip: an A100 would not run what could be built."""
    request.addfinalizer(cuda.chip.cache_clear)
    cuda.chip.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(chips))

    def properties(index):
        major, minor = chips[index]
        return SimpleNamespace(major=major, minor=minor, multi_processor_count=108, L2_cache_size=1)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    fake: Any = ImportError("no nvcc")
    if built is not None:
        fake = SimpleNamespace(architectures=built, device_count=lambda: len(chips))
    monkeypatch.setattr(native, "ModuleType", SimpleNamespace)
    monkeypatch.setitem(native._extensions, "_cuda", fake)
    found = cuda_sm90.available()
    if reason is not None:
        assert found == reason
    elif built is None:
        assert "no nvcc" in (found or "")
    else:
        assert found == (
            None if "sm_90a" in built else f"the extension is built for {built}, not sm_90a"
        )


def unsupported(case, **changed):
    inputs = cases.make(case, torch.bfloat16) | changed
    return cuda_sm90.unsupported_layout(emulated.call_of(inputs))


def test_reasons():
    fits = Case("fits", **SIZES)
    for case in CASES:
        assert unsupported(case) is None
    assert "hidden size 97, must be a multiple of 8" in unsupported(Case("odd"))
    odd: dict[str, Any] = {"H": 24, "I": 35, "E": 4}
    assert "down_proj has strides [840, 35, 1], must be" in unsupported(Case("odd inner", **odd))
    side = unsupported(Case("transposed", transposed=True, **odd))
    assert side == (
        "inner size 35, must be a multiple of 8 where gate and up are concatenated along the "
        "contiguous dimension"
    )
    x, w = torch.zeros(33, 280, dtype=torch.bfloat16), torch.zeros(5, 136, 136).bfloat16()
    assert unsupported(fits, hidden_states=x[:, 3:139]).startswith("hidden_states starts at ")
    assert "[280, 2]" not in str(unsupported(fits, hidden_states=x[:, :272:2]))  # copied first
    assert unsupported(fits, hidden_states=x.view(-1)[: 33 * 137].view(33, 137)[:, :136]) == (
        "hidden_states has strides [137, 1], must be contiguous along rows or columns and "
        "have multiples of 8 elsewhere"
    )
    assert "down_proj has strides [0, 136, 1]" in unsupported(
        fits, down_proj=w[:1].expand(4, -1, -1)
    )
    assert unsupported(fits, down_proj=w[:4].mT) is None
