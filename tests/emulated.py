"""The kernels of csrc/cuda on the emulator of tests/simt: an extension module with the functions of
`reap_kernels._cuda`, for CPU tensors.

    result = run(inputs)                     # a dict of cases.make, as reap_kernels.cuda runs it
    result = run(inputs, seed=3, eager=True) # another order of lanes, warps and blocks; see `run`
    module().counters()                      # of the last run: bytes, bank conflicts, ...

g++ compiles it once for each state of the sources and keeps it in build/simt. One module does for
the kernels as they are and for their mutants (mutants.py), of which none is out of order unless
`configure` says so.
"""

import functools
import hashlib
import importlib.util
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import mutants
import programs

from reap_kernels import Saliency, Summed, cuda
from reap_kernels.contract import Call, make_call

ROOT = Path(__file__).parent.parent
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-shared", "-DREAP_SIMT", "-Wall", "-Wextra"]
FLAGS += ["-Wno-unknown-pragmas"]  # nvcc's
# Of a small H100: few processors, so that a wave of blocks is short.
CHIP = cuda.Chip(device=0, sm=90, processors=4, cache=1 << 20)


def missing() -> str | None:
    """Why the emulator cannot be built here, in one line."""
    pybind11 = importlib.util.find_spec("pybind11")
    return programs.missing() or (None if pybind11 else "needs pybind11")


@functools.cache
def module() -> ModuleType:
    return programs.load(compiled())


def compiled() -> Path:
    """The file of the extension module, in build/simt."""
    with tempfile.TemporaryDirectory() as folder:
        mutants.write(ROOT / "csrc", Path(folder) / "csrc")
        return _compiled(Path(folder) / "csrc")


def _compiled(sources: Path) -> Path:
    import pybind11

    includes = (sources, ROOT / "tests", ROOT / "tests/simt", pybind11.get_include())
    command = [programs.COMPILER, *FLAGS, *(f"-I{folder}" for folder in includes)]
    command += ["-isystem", sysconfig.get_path("include"), str(ROOT / "tests/simt/module.cpp")]
    digest = hashlib.sha256(repr((programs.COMPILER, FLAGS, sys.version)).encode())
    for folder in (sources, ROOT / "tests/simt"):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    name = f"simt_{digest.hexdigest()[:20]}"
    path = ROOT / "build/simt" / f"{name}.so"
    command.append(f"-DMODULE={name}")
    return programs.once(path, lambda new: programs.compile([*command, "-o", new]))


def call_of(inputs: dict, deterministic: bool = False) -> Call:
    """From arguments of moe_saliency by name, with its defaults."""
    return make_call(**inputs, deterministic=deterministic)


def run(
    inputs: dict, *, deterministic: bool = False, chip: cuda.Chip = CHIP, **options
) -> Saliency | Summed:
    """What `cuda.run` does, on the emulator. `options` of `configure` in module.cpp: seed, of the
    order of lanes, warps and blocks; eager, cp.async at once and not at the wait for it; profile,
    count bank conflicts; cache_bytes and together, model an L2 cache. RuntimeError is a fault."""
    module().configure(**options)
    return cuda.execute(module(), call_of(inputs, deterministic), chip, stream=0)


def counters() -> dict:
    """What the last run of this thread did: launches, bytes, bank conflicts; see `to_dict`."""
    return module().counters()


def fault() -> type[Exception]:
    """What a run raises when a kernel breaks a rule: "kind at file:line: ..."."""
    return module().Fault
