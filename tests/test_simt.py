"""The SIMT emulator of tests/simt: it names each planted fault for what it is, and nothing else."""

import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import programs
import pytest

pytestmark = pytest.mark.skipif(programs.missing() is not None, reason=str(programs.missing()))
SOURCES = sorted(Path(__file__).parent.glob("simt/faults_*.h"))
# The switch of stacks by hand, and the portable one, for which it all is compiled again.
MODES = (
    pytest.param([], id="assembly"),
    pytest.param(["-DSIMT_UCONTEXT"], id="ucontext", marks=pytest.mark.slow),
)


class Run(NamedTuple):
    sum: float
    read: int
    written: int
    added: int
    kind: str
    place: str
    address: str
    lanes: str
    message: str


# Kind, address and lanes of the report as patterns, and the healthy twin's sum of `out`.
SHARED, THREAD = r"shared \+ \d+", r"block \(\d, 0, 0\) thread \d+ \(warp \d lane \d+\)"
FAULTS = {
    "missing_barrier": ("race", SHARED, THREAD, 8128),
    "missing_syncwarp": ("race", SHARED, THREAD, 2016),
    "syncwarp_for_a_barrier": ("race", SHARED, THREAD, 992),
    "half_a_warp": ("race", SHARED, THREAD, 2016),
    "reader_outside_mask": ("race", r"shared \+ 0", THREAD, 85),
    "lane_left_out": ("race", SHARED, THREAD, 496),
    "parts_of_a_vector": ("race", SHARED, THREAD, 1984),
    "barrier_of_others": ("race", SHARED, THREAD, 8128),
    "word_of_mouth": ("race", SHARED, THREAD, 496),
    "late_reader": ("race", r"shared \+ 0", THREAD, 5 * 224),
    "racing_writes": ("race", SHARED, THREAD, 992),
    "early_overwrite": ("race", SHARED, THREAD, 10208),
    "missing_wait": ("copy_in_flight", SHARED, THREAD, 8064),
    "missing_commit": ("copy_in_flight", SHARED, THREAD, 8064),
    "short_wait": ("copy_in_flight", SHARED, THREAD, 8064),
    "copy_no_barrier": ("race", SHARED, THREAD, 8064),
    "barrier_before_wait": ("race", SHARED, THREAD, 8064),
    "copy_outlives_thread": ("copy_in_flight", "", THREAD, 0),
    "global_out_of_bounds": ("out_of_bounds", r"in \+ 1024", r".*\(3,.* thread 63 .*", 32640),
    "global_before_start": ("out_of_bounds", "out - 4", ".* thread 0 .*", 2016),
    "slice_out_of_bounds": ("out_of_bounds", r"first \+ 256", ".* thread 63 .*", 0),
    "shared_out_of_bounds": ("out_of_bounds", r"shared \+ 2048", ".* thread 63 .*", 0),
    "shared_before_start": ("out_of_bounds", r"shared \+ -4", ".* thread 0 .*", 0),
    "misaligned_vector": ("misaligned", r"in \+ \d+", THREAD, 1152),
    "newer_instruction": ("launch", "", THREAD, 64),
    "misaligned_row": ("misaligned", r"shared \+ 8", r".*\(warp \d lane 0\)", 0),
    "divergent_collective": ("divergence", "", THREAD, 4032),
    "divergent_mask": ("divergence", "", THREAD, 64 * 0xAAAAAAAA),
    "divergent_barrier": ("divergence", "", THREAD, 64),
    "collective_and_barrier": ("divergence", "", THREAD, 32),
    "shuffle_from_outsider": ("divergence", "", THREAD, 120 + 632),
    "outside_its_mask": ("divergence", "", r".*lane (28|29|30|31)\)", 32 * 0xAAAAAAAA),
    "two_on_a_line": ("divergence", "", THREAD, 32),
    "partial_warp": ("exited_lane", "", r".*\(warp 1 lane \d\)", 40),
    "barrier_counts": ("divergence", "", THREAD, 64),
    "exited_lane": ("exited_lane", "", THREAD, 64),
    "barrier_after_exit": ("exited_lane", "", THREAD, 64),
    "deadlock": ("deadlock", "", THREAD, 64),
    "uninitialised_shared": ("uninitialised", r"shared \+ 28", ".* thread 6 .*", 0),
    "uninitialised_global": ("uninitialised", r"sums \+ \d+", THREAD, 0),
    "blocks_write_the_same": ("race", r"out \+ \d+", THREAD, 32640),
    "block_reads_another": ("race", r"out \+ \d+", THREAD, 256),
    "store_beside_atomics": ("race", r"out \+ 24", ".* thread 3 .*", 512),
    "read_beside_atomics": ("race", r"out \+ \d+", THREAD, 128),
    "global_without_barrier": ("race", r"out \+ \d+", THREAD, 4032),
    "misaligned_copy": ("misaligned", r"in \+ \d+", THREAD, 4 * 1953),
    "store_to_input": ("read_only", r"in \+ 0", ".* thread 0 .*", 1),
    "launch_not_waited_for": ("race", r"in \+ (20|148)", r".* lane 5\)", 2016),
    "launch_ends_first": ("race", "", r".* lane 5\)", 2016),
    "trap": ("trap", "", ".* thread 63 .*", 0),
    "runaway": ("runaway", "", ".* thread 0 .*", 0),
    "runaway_votes": ("runaway", "", THREAD, 0),
    "too_much_shared": ("launch", "", "", 0),
    "too_many_threads": ("launch", "", "", 0),
    "no_block": ("launch", "", "", 0),
}


@pytest.fixture(scope="module", params=MODES)
def runs(request):
    """Every run of the program: (name, broken) -> {(seed, mode): Run}."""
    found: defaultdict[tuple, dict] = defaultdict(dict)
    for line in programs.output(programs.build("faults.cpp", *request.param)).splitlines():
        name, broken, seed, mode, *rest = line.decode().split("\t")
        total, read, written, added, kind, at, *words = rest
        run = Run(float(total), int(read), int(written), int(added), kind, at, *words)
        found[name, broken == "1"][seed, mode] = run
    return found


@pytest.fixture(scope="module")
def probe():
    return programs.build("probe.cpp")


def marked_places(name):
    return {
        f"{source.name}:{i}"
        for source in SOURCES
        for i, line in enumerate(source.read_text().splitlines(), 1)
        if name in line.partition("//!")[2].split()
    }


def test_every_kernel_has_an_expectation(runs):
    assert {name for name, _ in runs} == set(FAULTS)


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_named(runs, name):
    kind, address, lanes, _ = FAULTS[name]
    places = marked_places(name) or {"(nowhere)"}  # a launch that is refused has no line
    assert len(runs[name, True]) == 16
    for run in runs[name, True].values():
        assert run.kind == kind, run.message
        assert run.place in places, run.message
        assert re.fullmatch(address, run.address), run.message
        assert re.fullmatch(lanes, run.lanes), run.message
        assert run.kind in run.message and run.address in run.message


@pytest.mark.parametrize("name", FAULTS)
def test_healthy_twin_is_clean(runs, name):
    assert len(runs[name, False]) == 16
    for run in runs[name, False].values():
        assert run.kind == "clean", run.message
        assert run.sum == pytest.approx(FAULTS[name][3], rel=1e-6)


def test_same_seed_same_report(runs):
    reports = defaultdict(set)
    for (name, broken), several in runs.items():
        for (seed, _), run in several.items():
            reports[name, broken].add((seed, run.message.replace("\n", " ")))
    # The mode of cp.async decides what is copied when, not who runs: one report per seed.
    assert all(len(found) == 8 for found in reports.values())
    # And seeds do change who runs first.
    assert len({report for _, report in reports["racing_writes", True]}) > 2


def test_bytes_are_counted(runs):
    for run in runs["global_out_of_bounds", False].values():
        assert (run.read, run.written, run.added) == (1024, 1024, 0)
    for run in runs["store_beside_atomics", False].values():
        assert (run.read, run.written, run.added) == (0, 0, 4 * 64 * 8)


def test_shuffles_and_votes(probe):
    x = np.random.default_rng(0).integers(0, 2**32, 32, dtype=np.uint32)
    lanes = list(range(32))
    got = np.frombuffer(programs.output(probe, "warp", input=x.tobytes()), np.uint32)
    got = got.reshape(32, 7).T
    bits = [1 << lane for lane in lanes]
    expected = [
        x[x % 32],
        np.repeat(x[3::8], 8),
        x[[lane ^ 5 for lane in lanes]],
        np.concatenate([x[:3], x[:29]]),
        np.concatenate([half[[*range(4, 16), *range(12, 16)]] for half in (x[:16], x[16:])]),
        [sum(bit for bit, value in zip(bits, x, strict=True) if value % 2)] * 32,
        [sum(bit for bit, v in zip(bits, x, strict=True) if v % 4 == value % 4) for value in x],
    ]
    np.testing.assert_array_equal(got, expected)


LANES = np.arange(32, dtype=np.int32)
WAVEFRONTS = [  # bytes of an access, offsets, wavefronts, of them conflicts
    ("a row of words", 4, LANES * 4, 1, 0),
    ("one word for all", 4, LANES * 0 + 64, 1, 0),
    ("every second word", 4, LANES * 8, 2, 1),
    ("a column of 128-byte rows", 4, LANES * 128, 32, 31),
    ("a column of padded rows", 4, LANES * 132, 1, 0),
    ("a row of pairs", 8, LANES * 8, 2, 0),
    ("a row of quads", 16, LANES * 16, 4, 0),
    ("eight rows of 128 bytes, one column", 16, LANES % 8 * 128 + LANES // 8 * 16, 32, 28),
    ("the same, swizzled", 16, LANES % 8 * 128 + (LANES // 8 ^ LANES % 8) * 16, 4, 0),
]


@pytest.mark.parametrize("case", WAVEFRONTS, ids=lambda case: case[0])
def test_wavefronts(probe, case):
    _, size, offsets, wavefronts, conflicts = case
    counted = programs.output(probe, "wavefronts", str(size), input=offsets.astype("<i4").tobytes())
    assert counted.split() == [str(wavefronts).encode(), str(conflicts).encode()]
