"""What nvcc makes of csrc/cuda: nothing spills, and the machine code has what the wrappers claim.

The emulator runs the same source but replaces the wrappers; this is the other half.
"""

import re
from collections import Counter
from itertools import product

import nvcc
import pytest
import sass
import triton

pytestmark = pytest.mark.skipif(nvcc.missing() is not None, reason=str(nvcc.missing()))

ARCHS = ("sm_80", "sm_90a")  # in the extension that setup.py makes, so that nvcc has no work
WHOLE = [(rows, layout) for rows, layout in product((32, 64, 128), ("k_major", "mn_major"))]
TILES = [*WHOLE, (64, "any")]
GEMMS = ("gate_up_kernel", "down_kernel")
HMMA = {"bf16": "HMMA.16816.F32.BF16", "fp16": "HMMA.16816.F32"}


def prepare() -> None:
    """Compiles for all tests; conftest calls it while others run."""
    if nvcc.missing() is None:
        for arch in ARCHS:
            nvcc.compiled(arch)


@pytest.fixture(scope="module", params=[*ARCHS, pytest.param("newest", marks=pytest.mark.slow)])
def arch(request):
    return nvcc.newest() if request.param == "newest" else request.param


@pytest.fixture(scope="module")
def kernels(arch):
    return {kernel.name: kernel for kernel in nvcc.compiled(arch)}


def opcodes(instructions: list[str]) -> Counter:
    """Opcodes with their modifiers, without predicates; ["@!P0 LDS R1, [R2]"] -> {"LDS": 1}"""
    return Counter(re.sub(r"^@!?U?PT?\d* +", "", each).split()[0] for each in instructions)


def test_opcodes():
    given = ["@!PT LDS RZ, [RZ]", "@UP1 UMOV UR1, UR2", "BAR.SYNC 0x0", "@P0 BRA `(.L_x_1)"]
    assert opcodes(given) == {"LDS": 1, "UMOV": 1, "BAR.SYNC": 1, "BRA": 1}


def listing(lines) -> str:
    """As nvdisasm prints labels and instructions."""
    return "\n".join(x if x.endswith(":") else f"        /*0010*/      {x} ;" for x in lines)


def test_main_loop_is_the_smallest_with_most_tensor_instructions():
    lines = (".L_x_1:", "MOV R1, R2", ".L_x_2:", "HMMA.16816.F32 R1", "@P0 BRA `(.L_x_2)",
             "@P1 BRA `(.L_x_1)", ".L_x_3:", "IADD3 R1", "@P0 BRA `(.L_x_3)", "@P0 BRA `(.L_x_4)",
             ".L_x_4:", "HMMA.16816.F32 R1", "HMMA.16816.F32 R1", "EXIT")  # fmt: skip
    code = listing(lines)
    loop = sass.main_loop(code)
    assert loop == ["HMMA.16816.F32 R1", "@P0 BRA `(.L_x_2)"]
    assert sass.inner_loops(code) == [loop]
    apart = (".L_x_1:", ".L_x_2:", *loop, ".L_x_3:", "HGMMA R1", "BRA `(.L_x_3)", "BRA `(.L_x_1)")
    inner = sass.inner_loops(listing(apart))
    assert inner == [loop, ["HGMMA R1", "BRA `(.L_x_3)"]]
    assert sass.share(loop) == {"tensor": 1, "others": 1, "ratio": 1.0}
    assert sass.main_loop("        /*0010*/      EXIT ;") == []


def test_every_instantiation_is_there(kernels):
    wanted = {
        f"{kernel}<{dtype}, {rows}, {layout}>"
        for kernel, dtype, (rows, layout) in product(GEMMS, HMMA, TILES)
    } | {f"finish_kernel<{dtype}>" for dtype in HMMA}
    wanted |= {f"sum_kernel<{dtype}>" for dtype in HMMA}
    wanted |= {f"project_kernel<{dtype}, {k}>" for dtype, k in product(HMMA, ("true", "false"))}
    wanted |= {"route_kernel", "count_kernel", "scan_kernel", "place_kernel"}
    assert wanted == {name for name in kernels if not name.startswith("sm90::")}


def test_nothing_spills(kernels):
    """And no shared memory beside what launches ask for, which the emulator holds to 99 KB (what
    blocks may have on the chips with least), but the system's 1 KB on newer chips."""
    for kernel in kernels.values():
        assert kernel.stack == kernel.local == 0, kernel[:5]
        assert kernel.static_shared in (0, 1024), kernel[:5]
        found = opcodes(sass.instructions(kernel.code))
        assert not [opcode for opcode in found if opcode.startswith(("LDL", "STL"))], kernel.name


def test_kernels_let_the_next_start_and_wait_for_the_launch_before(kernels, arch):
    """From sm_90 on, before anything in global memory is touched."""
    for kernel in kernels.values():
        code = sass.instructions(kernel.code)
        if kernel.name.startswith("sm90::") and arch != "sm_90a":
            continue  # these trap
        waits = [i for i, each in enumerate(code) if "ACQBULK" in each]
        # Those for Hopper in two branches, that begin where warps give registers back or take them.
        branches = [i for i, each in enumerate(code) if "USETMAXREG" in each] or [0]
        assert len(waits) == len(branches) * (arch != "sm_80"), kernel.name
        touching = re.compile(r"\b(?:LDG|STG|LDGSTS|RED|REDG|ATOM|ATOMG|UTMALDG|UBLK\w+)\b")
        before = [*code[: branches[0]]]
        for start, wait in zip(branches, waits, strict=arch != "sm_80"):
            before += code[start:wait]
        assert not any(touching.search(each) for each in before), kernel.name
        starts = [i for i, each in enumerate(code) if "PREEXIT" in each]
        last = kernel.name.startswith("finish_kernel")
        assert len(starts) == (arch != "sm_80" and not last), kernel.name
        assert all(start < waits[0] for start in starts), kernel.name


@pytest.mark.parametrize("dtype", HMMA)
@pytest.mark.parametrize(("rows", "layout"), WHOLE)
@pytest.mark.parametrize("gemm", GEMMS)
def test_main_loop_has_the_claimed_instructions(kernels, gemm, rows, layout, dtype):
    """Per slice of 64 along k and warp: every mma once, each operand loaded once by ldmatrix and
    copied once by cp.async of 16 bytes, one commit, one wait and one barrier."""
    loop = kernels[f"{gemm}<{dtype}, {rows}, {layout}>"].loop
    found = opcodes(loop)
    strips, steps = rows // 32, 64 // 16
    assert {op: n for op, n in found.items() if op.startswith("HMMA")} == {
        HMMA[dtype]: steps * strips * 8
    }
    a, b = steps * strips, steps * 4
    if layout == "k_major":
        loads = {"LDSM.16.M88.4": a + b}
    else:
        loads = {"LDSM.16.M88.4": a, "LDSM.16.MT88.4": b}
    assert {op: n for op, n in found.items() if op.startswith("LDSM")} == loads
    copies = {op: n for op, n in found.items() if op.startswith("LDGSTS")}
    assert sum(copies.values()) == (rows + 128) // 16
    assert all(".BYPASS." in op and "128" in op.split(".") for op in copies), copies
    assert not [each for each in loop if re.match("@.*LDGSTS", each)]  # skipped, not filled with 0
    assert found["LDGDEPBAR"] == found["DEPBAR.LE"] == 1
    assert sum(n for op, n in found.items() if op.startswith("BAR.SYNC")) == 1


@pytest.mark.parametrize("dtype", HMMA)
@pytest.mark.parametrize(("rows", "layout"), TILES)
def test_down_adds_without_reading_back(kernels, arch, rows, layout, dtype):
    """Four floats of a lane at a time from sm_90 on, one before; never two rows of fragments."""
    found = opcodes(sass.instructions(kernels[f"down_kernel<{dtype}, {rows}, {layout}>"].code))
    added = {op for op in found if op.startswith("RED") and "ADD" in op}
    assert added and all(("F32x4" in op) == (arch != "sm_80") for op in added), added
    assert not any("x2" in op for op in added)
    assert not any(op.startswith("ATOM") for op in found)


@pytest.mark.parametrize("dtype", HMMA)
@pytest.mark.parametrize(("layout", "least"), (("k_major", 1.0), ("mn_major", 0.9)))
@pytest.mark.parametrize("gemm", GEMMS)
def test_largest_tiles_issue_mostly_tensor_instructions(kernels, gemm, layout, least, dtype):
    """On chips without the NOPs that sm_120 and sm_121 want between tensor-core instructions."""
    loop = kernels[f"{gemm}<{dtype}, 128, {layout}>"].loop
    assert sass.share([each for each in loop if each != "NOP"])["ratio"] > least


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set")
def test_main_loop_beats_tritons_for_the_same_tile():
    ours = {kernel.name: sass.share(kernel.loop) for kernel in nvcc.compiled("sm_80")}
    for theirs in nvcc.triton_tile("sm_80", nvcc.SAME_TILE):
        mine = ours[f"{theirs['kernel']}<bf16, 128, k_major>"]
        assert mine["tensor"] == theirs["loop"]["tensor"], "not the same tile"
        print(theirs["kernel"], "sm_80: ours", mine, "Triton's", theirs["loop"], theirs["spills"])
        assert mine["ratio"] > theirs["loop"]["ratio"]
