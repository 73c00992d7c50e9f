"""Compiles what tests run, once for each state of the sources, whichever process needs it first:
here the programs of tests/simt, by the C++ compiler that is here. All is kept in build."""

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).parent
BUILD = TESTS.parent / "build"
COMPILER = os.environ.get("CXX", "g++")


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
    """`path`, by `make` if it is not there yet: under another name, so that it is whole. Who comes
    second, thread or process, waits for the first."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f"{path.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # goes with the file, however its process ends
            if not path.exists():
                new = path.with_name(f"{path.name}.{os.getpid()}")
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
def build(source: str, *flags: str) -> Path:
    """The program of one file of tests/simt, compiled."""
    command = [COMPILER, "-std=c++17", "-O1", "-DREAP_SIMT", *flags, f"-I{TESTS}"]
    version = subprocess.run([COMPILER, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(repr((command, version)).encode())
    for folder in (TESTS / "simt", TESTS.parent / "csrc/cuda"):  # what it may include
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    program = BUILD / "simt" / f"{Path(source).stem}_{digest.hexdigest()[:20]}"
    command.append(str(TESTS / "simt" / source))
    return once(program, lambda new: compile([*command, "-o", str(new)]))


def output(program: Path, *arguments: str, input: bytes = b"") -> bytes:
    done = subprocess.run([program, *arguments], input=input, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout
