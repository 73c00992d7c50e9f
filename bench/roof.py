"""Roofs of this machine, measured by `peak.cpp`, which is compiled at run time."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("peak.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")


@cache
def _compiled() -> ctypes.CDLL | str:
    """The compiled roofs, or why there are none."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "no C++ compiler (g++, clang++ or $CXX): fraction_of_peak stays empty"
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / f"peak-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}.so"
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"{SOURCE.name} does not compile: {done.stderr.strip().splitlines()[0]}"
        library = ctypes.CDLL(str(built))
    library.fma_peak.restype = library.read_bandwidth.restype = ctypes.c_double
    library.fma_peak.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_double)
    library.read_bandwidth.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return library


def missing() -> str | None:
    """Why the roofs cannot be measured here; None if they can."""
    library = _compiled()
    return library if isinstance(library, str) else None


def _library() -> ctypes.CDLL:
    library = _compiled()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


def fma_peak(dtype: str, threads: int, seconds: float) -> float:
    """Multiply-adds from registers in independent sums, two FLOPs each [FLOP/s]: of bf16 where the
    processor multiplies that, else of fp32, which every other dtype is widened to."""
    return _library().fma_peak(dtype == "bf16", threads, seconds)


def read_bandwidth(data: torch.Tensor, threads: int) -> float:
    """Sequential reads of `data` [bytes/s]."""
    return _library().read_bandwidth(data.data_ptr(), data.nbytes, threads)
