"""Builds the programs of tests/simt with the C++ compiler that is here."""

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent
COMPILER = os.environ.get("CXX", "g++")


def missing() -> str | None:
    """Why the emulator cannot be built here, in one line."""
    if shutil.which(COMPILER) is None:
        return f"needs a C++17 compiler, and there is no {COMPILER}: set CXX"
    return None


@functools.cache
def folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="simt-")  # goes when the process does


@functools.cache
def build(source: str, *flags: str) -> Path:
    """The program of one file of tests/simt, compiled."""
    program = Path(folder().name) / "-".join([source, *flags])
    command = [COMPILER, "-std=c++17", "-O1", "-DREAP_SIMT"]
    command += [*flags, f"-I{TESTS}", str(TESTS / "simt" / source), "-o", str(program)]
    done = subprocess.run(command, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode()[-8000:]
    return program


def output(program: Path, *arguments: str, input: bytes = b"") -> bytes:
    done = subprocess.run([program, *arguments], input=input, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout
