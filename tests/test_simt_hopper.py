"""The emulator's Hopper: each planted fault is named for what it is, and boxes, descriptors and
fragments lie where a second model, made from the figures of the PTX ISA, says."""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import programs
import pytest
import torch

pytestmark = pytest.mark.skipif(programs.missing() is not None, reason=str(programs.missing()))
SOURCE = Path(__file__).parent / "simt/hopper_faults.cpp"

# Kind of the report, and the healthy twin's sum of `out`.
FAULTS = {
    "never_made": ("mbarrier", 0),
    "made_twice": ("mbarrier", 0),
    "arrival_too_many": ("mbarrier", 0),
    "arrival_too_few": ("deadlock", 0),
    "bytes_that_never_come": ("deadlock", 0),
    "wrong_phase": ("race", 64),
    "no_wait_for_others": ("race", 32),
    "elected_arrival": ("race", 32),
    "elected_wait": ("race", 32),
    "barrier_not_shown": ("proxy", 0),
    "box_misaligned": ("misaligned", 0),
    "box_past_shared": ("out_of_bounds", 0),
    "tensor_past_buffer": ("out_of_bounds", 0),
    "box_over_box": ("race", 0),
    "box_over_readers": ("race", 64),
    "box_after_the_end": ("copy_in_flight", 0),
    "signal_before_copy": ("race", 64),
    "thread_ends_first": ("copy_in_flight", 0),
    "launch_loads_early": ("race", 64),
    "hint_past_buffer": ("out_of_bounds", 0),
    "unfenced_stores": ("proxy", 2048),
    "early_fence": ("proxy", 2048),
    "unfenced_copies": ("proxy", 2048),
    "missing_wgmma_fence": ("registers", 4096),
    "touched_in_flight": ("registers", 4096),
    "missing_wgmma_wait": ("race", 4096),
    "short_wgmma_wait": ("race", 4096),
    "lanes_differ": ("divergence", 4096),
    "warps_differ": ("divergence", 4096),
    "no_swizzle_mode": ("launch", 4096),
    "unwritten_operand": ("uninitialised", 4096),
    "released_too_soon": ("race", 2048),
    "half_a_warpgroup": ("deadlock", 2048),
    "unwritten_token": ("uninitialised", 4096),
    "unwritten_weights": ("uninitialised", 4096),
    "touched_octet": ("registers", 4096),
    "another_width": ("registers", 4096),
    "stmatrix_odd_row": ("misaligned", 64),
    "stmatrix_past_shared": ("out_of_bounds", 64),
    "stmatrix_unfenced": ("proxy", 64),
    "stmatrix_unmet": ("race", 64),
    "stmatrix_lane_missing": ("exited_lane", 64),
    "second_product_touched": ("registers", 4096),
    "turn_not_waited_for": ("race", 64),
    "stage_of_the_other_freed": ("race", 32),
    "bulk_unfenced": ("proxy", 256),
    "bulk_unmet": ("race", 256),
    "bulk_overwritten": ("race", 256),
    "bulk_met_too_late": ("race", 256),
    "bulk_half_a_chunk": ("launch", 256),
    "bulk_odd_source": ("misaligned", 256),
    "bulk_odd_target": ("misaligned", 256),
    "bulk_past_target": ("out_of_bounds", 256),
    "bulk_past_source": ("out_of_bounds", 256),
    "bulk_to_input": ("read_only", 256),
    "bulk_from_nothing": ("uninitialised", 256),
    "bulk_not_committed": ("copy_in_flight", 128),
    "bulk_not_waited": ("copy_in_flight", 128),
}


class Run(NamedTuple):
    sum: float
    kind: str
    place: str
    message: str


@pytest.fixture(scope="module")
def runs():
    """Every run of the program: (name, broken) -> the runs, of each seed and mode."""
    found = defaultdict(list)
    for line in programs.output(programs.build(SOURCE.name)).decode().splitlines():
        name, broken, _, _, total, *words = line.split("\t")
        found[name, broken == "1"].append(Run(float(total), *words))
    return found


def marked_places(name):
    """Lines that end in the mark, or follow it."""
    places, marked = set(), False
    for i, line in enumerate(SOURCE.read_text().splitlines(), 1):
        code, _, names = line.partition("//!")
        marked |= name in names.split()
        if marked and code.strip():
            places.add(f"{SOURCE.name}:{i}")
        marked &= not code.strip()
    return places


def test_every_kernel_has_an_expectation(runs):
    assert {name for name, _ in runs} == set(FAULTS)


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_named(runs, name):
    places = marked_places(name) or {"(nowhere)"}
    assert len(runs[name, True]) == 12
    for run in runs[name, True]:
        assert run.kind == FAULTS[name][0] and run.place in places, run.message


@pytest.mark.parametrize("name", FAULTS)
def test_healthy_twin_is_clean(runs, name):
    assert len(runs[name, False]) == 12
    for run in runs[name, False]:
        assert run.kind == "clean", run.message
        assert run.sum == FAULTS[name][1]


# "128B swizzle" as the ISA draws it: which 16-byte chunk lies in each column of the rows 0 to 7.
SWIZZLE = np.array([
    [0, 1, 2, 3, 4, 5, 6, 7],
    [1, 0, 3, 2, 5, 4, 7, 6],
    [2, 3, 0, 1, 6, 7, 4, 5],
    [3, 2, 1, 0, 7, 6, 5, 4],
    [4, 5, 6, 7, 0, 1, 2, 3],
    [5, 4, 7, 6, 1, 0, 3, 2],
    [6, 7, 4, 5, 2, 3, 0, 1],
    [7, 6, 5, 4, 3, 2, 1, 0],
])  # fmt: skip


def swizzled(rows):
    """[n, 64] 16-bit -> the same as they lie in shared memory from a multiple of 1024 on."""
    atoms = rows.reshape(-1, 8, 8, 8)  # atom, row, chunk, element
    return np.take_along_axis(atoms, SWIZZLE[None, :, :, None], axis=2).reshape(-1, 64)


def d_fragment(matrix):
    """[64, N] -> [thread, register]: rows are (warp, r1, g), columns (j, t, r0)."""
    taken_apart = matrix.reshape(4, 2, 8, -1, 4, 2)
    return taken_apart.transpose(0, 2, 4, 3, 1, 5).reshape(128, -1)


def descriptor(start, leading, stride):
    """The table "Matrix descriptor format": bits 0-13, 16-29, 32-45, and 62-63: 1 for 128 bytes."""
    return sum(x >> 4 << bit for x, bit in ((start, 0), (leading, 16), (stride, 32))) + (1 << 62)


def test_models_have_the_entries_of_the_figures():
    # "WGMMA .m64nNk16 register fragment layout for accumulator matrix D": (row, column) of d[i].
    place = d_fragment(np.arange(64 * 256).reshape(64, 256))
    entries = {(0, 0): (0, 0), (0, 2): (8, 0), (1, 1): (0, 3), (5, 4): (1, 10), (31, 3): (15, 7),
               (32, 0): (16, 0), (127, 127): (63, 255)}  # fmt: skip
    for (thread, i), at in entries.items():
        assert divmod(place[thread, i], 256) == at


@pytest.fixture(scope="module")
def probe():
    program = programs.build("hopper_probe.cpp")

    def run(*arguments, operands, result):
        raw = b"".join(np.ascontiguousarray(x).tobytes() for x in operands)
        return np.frombuffer(programs.output(program, *arguments, input=raw), result)

    return run


BOXES = {  # shape of the tensor, slowest dimension first; box; where it starts
    "inside": ((40, 128), (16, 64), (8, 64)),
    "past both ends": ((20, 72), (16, 64), (10, 40)),
    "before the start": ((20, 72), (8, 64), (-3, -8)),
    "one of three": ((3, 24, 64), (1, 16, 64), (2, 16, 0)),
    "halves of experts": ((5, 2, 70, 136), (1, 1, 64, 64), (4, 1, 32, 128)),
    "narrower than a box": ((2, 1, 8, 8), (1, 1, 64, 64), (1, 0, 0, 0)),
    "nowhere": ((20, 64), (8, 64), (20, 0)),
}


@pytest.mark.parametrize("name", BOXES)
def test_box(probe, name):
    shape, box, at = BOXES[name]
    tensor = np.random.default_rng(1).integers(1, 2**16, shape, dtype=np.uint16)
    strides = [stride // 2 for stride in tensor.strides]
    four = [np.array(x[::-1] + (1,) * (4 - len(shape))) for x in (shape, tuple(strides), box, at)]
    numbers = np.concatenate([[len(shape)], *four, [tensor.size]]).astype(np.int64)
    got = probe("box", operands=(numbers, tensor), result=np.uint16).reshape(-1, 64)
    # Enough zeros around the tensor that the box is a slice.
    room = np.pad(tensor, [(size, size) for size in box])
    cut = tuple(slice(a + size, a + 2 * size) for a, size in zip(at, box, strict=True))
    np.testing.assert_array_equal(got, swizzled(room[cut].reshape(-1, 64)))


def rows(x):
    """Of 64 elements each, as they lie in shared memory."""
    return swizzled(x.reshape(-1, 64).contiguous().view(torch.int16).numpy().view(np.uint16))


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("major", ("k", "mn"))
@pytest.mark.parametrize("columns", (192, 256))
def test_wgmma(probe, columns, major, step):
    """Each 16 of the 64 k that lie in shared memory: A [64, 64] and behind it B [64, columns]."""
    rng = torch.Generator().manual_seed(step)
    a = torch.randn(64, 64, generator=rng).bfloat16()
    b = torch.randn(64, columns, generator=rng).bfloat16()
    d = torch.randn(64, columns, generator=rng)
    if major == "k":  # a row of 64 k for each column
        image = rows(b.T)
        start, leading, stride = step * 32, 0, 1024
    else:  # boxes of 64 columns, in each a row for each k
        image = rows(b.reshape(64, -1, 64).transpose(0, 1))
        start, leading, stride = step * 16 * 128, 64 * 128, 1024
    descriptors = np.array(
        [descriptor(step * 32, 0, 1024), descriptor(8192 + start, leading, stride)], np.uint64
    )
    rest = np.zeros((256 - columns) * 64, np.uint16)  # of the 40 KB
    operands = (rows(a), image, rest, descriptors, d_fragment(d.numpy()))
    found = probe("wgmma", major, str(columns), operands=operands, result=np.float32)
    got = found.reshape(128, columns // 2)
    k = slice(16 * step, 16 * step + 16)
    exact = a[:, k].double() @ b[k].double() + d.double()
    np.testing.assert_allclose(got, d_fragment(exact.numpy()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("step", (0, 3))
@pytest.mark.parametrize("columns", (8, 24, 128))
@pytest.mark.parametrize("major", ("k", "mn"))
def test_wgmma_of_other_widths(probe, major, columns, step):
    """The same with B [64, columns], and with an A [64, 64] whose rows in shared memory are k."""
    rng = torch.Generator().manual_seed(step)
    a = torch.randn(64, 64, generator=rng).bfloat16()
    b = torch.randn(64, columns, generator=rng).bfloat16()
    d = torch.randn(64, columns, generator=rng)
    rest = np.zeros((40 << 10) - (64 + columns) * 128, np.uint8)
    start = step * (32 if major == "k" else 16 * 128)
    descriptors = [descriptor(start, 8192, 1024), descriptor(8192 + step * 32, 0, 1024)]
    image = rows(a if major == "k" else a.T), rows(b.T), rest
    operands = (*image, np.array(descriptors, np.uint64), d_fragment(d.numpy()))
    got = probe("narrow", major, str(columns), operands=operands, result=np.float32)
    k = slice(16 * step, 16 * step + 16)
    exact = d_fragment((a[:, k].double() @ b[k].double() + d.double()).numpy())
    np.testing.assert_allclose(got.reshape(128, -1), exact, rtol=0, atol=1e-5)


def test_stmatrix(probe):
    """With .trans, as the ISA draws it: lane l has elements (2 (l % 4) + {0, 1}, l / 4)."""
    matrices = np.random.default_rng(1).integers(1, 2**16, (2, 8, 8), dtype=np.uint16)
    lanes = [
        [matrices[j, 2 * (lane % 4) + half, lane // 4] for j in range(2) for half in range(2)]
        for lane in range(32)
    ]
    registers = np.array(lanes, np.uint16)
    got = probe("stmatrix", operands=(registers,), result=np.uint16).reshape(2, 8, 8)
    np.testing.assert_array_equal(got, matrices)
