"""Compiles what tests run: here the programs of tests/simt, by the C++ compiler that is here."""

import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).parent
COMPILER = os.environ.get("CXX", "g++")

_compiling: dict[Path, threading.Lock] = {}  # by folder: one thing at a time, and nothing twice


def missing() -> str | None:
    """Why nothing of tests/simt can be compiled here, in one line."""
    if shutil.which(COMPILER) is None:
        return f"needs a C++17 compiler, and there is no {COMPILER}: set CXX"
    return None


def compile(command: list, **options) -> str:
    """What the compiler said, which is why the test fails if the compiler did."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """`path`, by `make` if it is not there yet: under another name, so that it is whole."""
    with _compiling.setdefault(path.parent, threading.Lock()):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_suffix(f".{os.getpid()}")
            make(new)
            new.rename(path)
    return path


def load(path: Path) -> ModuleType:
    """The extension module in a file, whose name begins with the module's."""
    spec = importlib.util.spec_from_file_location(path.name.partition(".")[0], path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="simt-")  # goes when the process does


@functools.cache
def build(source: str, *flags: str) -> Path:
    """The program of one file of tests/simt, compiled."""
    program = Path(folder().name) / "-".join([source, *flags])
    command = [COMPILER, "-std=c++17", "-O1", "-DREAP_SIMT"]
    command += [*flags, f"-I{TESTS}", str(TESTS / "simt" / source), "-o", str(program)]
    compile(command)
    return program


def output(program: Path, *arguments: str, input: bytes = b"") -> bytes:
    done = subprocess.run([program, *arguments], input=input, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout
