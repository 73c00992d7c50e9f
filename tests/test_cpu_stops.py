"""The CPU engine's threads wait for one another where they must: one that stops anywhere, for as
long as the others take for all they may do meanwhile, changes no bit. And none waits in vain: with
any wait out of order, that program's results differ."""

import hashlib
import re
import shutil
import signal
import subprocess
from pathlib import Path

import programs
import pytest

ROOT = Path(__file__).parent.parent
GCC = "g++"  # clang has no names for what is not instrumented
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-pthread", "-DREAP_OWN_THREADS"]
# Stops are in layer.cpp, which hands out the tasks.
INSTRUMENT = ["-finstrument-functions", "-finstrument-functions-exclude-file-list=/include/"]
WAIT = re.compile(r"(?<!void )wait_until\(([^;]*), ([^;]*)\);")
STOPS = 500  # mutants were found within 30 to 500
PATIENCE = 20_000

pytestmark = pytest.mark.skipif(shutil.which(GCC) is None, reason="needs g++, not in PATH")


def sources() -> tuple[dict[Path, str], list[str]]:
    """Those of the engine with a switch at each wait, and what the mutants are, from number 1 on:
    each wait left out, and each done one step too early."""
    mutants: list[str] = []

    def switch(found: re.Match[str]) -> str:
        mutants.extend([f"without {found[0]}", f"one step less in {found[0]}"])
        without, less = len(mutants) - 1, len(mutants)
        wait = f"wait_until({found[1]}, {found[2]} - (mutant == {less}))"
        return f"if (mutant != {without}) {wait};"

    paths = [ROOT / "csrc/layer.h", *sorted((ROOT / "csrc/cpu").iterdir())]
    texts = {path.relative_to(ROOT / "csrc"): path.read_text() for path in paths}
    return {path: WAIT.sub(switch, text) for path, text in texts.items()}, mutants


def program() -> Path:
    texts, _ = sources()
    main = ROOT / "tests/portable/stops.cpp"
    version = subprocess.run([GCC, "--version"], capture_output=True, check=True).stdout
    state = repr((version, FLAGS, INSTRUMENT, texts, main.read_text()))
    name = f"stops_{hashlib.sha256(state.encode()).hexdigest()[:20]}"

    def make(folder: Path) -> None:
        for path, text in texts.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(f"extern int mutant;\n{text}")
        compiler = [GCC, *FLAGS, f"-I{folder}"]
        programs.compile([*compiler, *INSTRUMENT, "-c", "cpu/layer.cpp"], cwd=folder)
        others = [f"cpu/{file}.cpp" for file in ("isa", "portable", "routing", "team")]
        programs.compile([*compiler, main, *others, "layer.o", "-o", "program"], cwd=folder)

    return programs.once(ROOT / "build/portable" / name, make) / "program"


def prepare() -> None:
    """Compiles; conftest calls it while other tests run."""
    if shutil.which(GCC) is not None:
        program()


def run(stops: int, mutant: int) -> int:
    return subprocess.run([program(), str(stops), str(mutant)]).returncode


def test_no_stop_changes_a_bit():
    assert run(STOPS, mutant=0) == 0


def test_the_engine_has_the_waits_that_are_tested():
    """In down for its turn, in run_gate_up for its buffer, in run_down for its inner rows."""
    assert len(sources()[1]) == 6


@pytest.mark.parametrize("mutant", range(1, 7))
def test_a_wait_out_of_order_shows(mutant):
    wrong, endless = 1, -signal.SIGPROF
    assert run(PATIENCE, mutant) in (wrong, endless), sources()[1][mutant - 1]
