"""csrc/cuda's host code as nvcc makes it, on a CUDA runtime that records and runs nothing.

    extension().run_layer(...)       # what reap_kernels._cuda has, from the objects of its build
    recorder().launches()            # what it launched, see tests/cudart/stub.cpp

setup.py compiles the objects for one architecture. All is kept in build/cudart, once for each state
of the sources.
"""

import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import nvcc
import programs

ROOT = Path(__file__).parent.parent
STUB = ROOT / "tests/cudart/stub.cpp"
# PTX alone: what ptxas would make of it, nobody looks at here.
ARCHITECTURES = "compute_80"
# setup.py's own way, but for the CPU extension.
BUILD = """
import runpy, setuptools, sys
given = {}
setuptools.setup = given.update
runpy.run_path("setup.py")
extensions = [each for each in given["ext_modules"] if each.name.endswith("_cuda")]
command = given["cmdclass"]["build_ext"](setuptools.Distribution({"ext_modules": extensions}))
command.build_lib = command.build_temp = sys.argv[1]
command.ensure_finalized()
command.run()
"""


def missing() -> str | None:
    """Why the host code cannot be compiled here, in one line."""
    pybind11 = importlib.util.find_spec("pybind11")
    return nvcc.missing() or (None if pybind11 else "needs pybind11")


@functools.cache
def extension() -> ModuleType:
    return _module("_cuda")


@functools.cache
def recorder() -> ModuleType:
    return _module("recorder")


def _module(name: str) -> ModuleType:
    """One of the two modules that are in the same library."""
    spec = importlib.util.spec_from_file_location(name, library())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def library() -> Path:
    return _built() / "library.so"


def objects() -> list[Path]:
    """What nvcc made of the extension's sources."""
    return sorted((_built() / "cuda").glob("*.o"))


def _built() -> Path:
    version = subprocess.run(["nvcc", "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(repr((ARCHITECTURES, BUILD, version, sys.version)).encode())
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cuh", ".h")]
    for path in (ROOT / "setup.py", ROOT / "csrc/cuda/bindings.cpp", STUB, *sorted(sources)):
        digest.update(path.read_bytes())
    return programs.once(ROOT / "build/cudart" / digest.hexdigest()[:20], _build)


def _build(folder: Path) -> None:
    import pybind11

    folder.mkdir(exist_ok=True)
    environment = os.environ | {"REAP_CUDA_ARCHS": ARCHITECTURES}
    options = subprocess.run(["nvcc", "--help"], capture_output=True, text=True, check=True).stdout
    if "--Ofast-compile" in options:  # a third of the time
        environment["NVCC_APPEND_FLAGS"] = "--Ofast-compile=max"
    said = programs.compile([sys.executable, "-c", BUILD, str(folder)], cwd=ROOT, env=environment)
    made = sorted(map(str, (folder / "cuda").glob("*.o")))
    assert len(made) >= 2, said[-8000:]  # the extension is optional: setup.py succeeds without it
    includes = (pybind11.get_include(), sysconfig.get_path("include"))
    flags = [flag for include in includes for flag in ("-isystem", include)]
    flags += ["-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    link = ["nvcc", "-shared", "-cudart", "none", *flags, str(STUB), *made]
    programs.compile([*link, "-o", str(folder / "library.so")])
