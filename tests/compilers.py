"""The CPU engine as other compilers make it, and on another processor.

    clang().available_isas()     # the extension module, made by clang++ through setup.py
    aarch64(call, threads=3)     # cross-compiled by g++ and executed by qemu: one process per call

Each is compiled once for each state of the sources and kept in build/portable.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace

import programs
import torch
from torch import Tensor

from reap_kernels import Saliency, Summed, native
from reap_kernels.contract import Call

ROOT = Path(__file__).parent.parent
CROSS = "aarch64-linux-gnu-g++"
FLAGS = ["-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", "-static", "-pthread"]
FLAGS += ["-DREAP_OWN_THREADS"]  # there is no libgomp to borrow from
SOURCES = [f"csrc/cpu/{name}.cpp" for name in ("isa", "layer", "portable", "routing", "team")]


def missing_clang() -> str | None:
    """Why `clang` cannot be made here, in one line."""
    if shutil.which("clang++") is None or shutil.which("clang") is None:
        return "needs clang and clang++, and they are not in PATH"
    return None if importlib.util.find_spec("pybind11") else "needs pybind11"


def missing_aarch64() -> str | None:
    """Why `aarch64` cannot run here, in one line."""
    if shutil.which(CROSS) is None:
        return f"needs {CROSS} (Debian: g++-aarch64-linux-gnu), and there is none in PATH"
    if _emulator() is None:
        return "needs qemu-aarch64 (Debian: qemu-user-static), and there is none in PATH"
    return None


def _emulator() -> str | None:
    return shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


@functools.cache
def clang() -> ModuleType:
    (path,) = compiled_by_clang().glob("reap_kernels/_native.*.so")
    return programs.load(path)


def compiled_by_clang() -> Path:
    """The folder with the package's extension as `CC=clang CXX=clang++ pip install .` makes it."""

    def build(folder: Path) -> list[str]:
        places = ["--build-lib", str(folder), "--build-temp", str(folder / "objects")]
        return [sys.executable, "setup.py", "build_ext", *places]

    environment = {"CC": "clang", "CXX": "clang++", "REAP_CUDA_ARCHS": "", "REAP_SANITIZE": ""}
    return _compiled("clang", build, environment, "reap_kernels/_native.*.so")


def compiled_for_aarch64() -> Path:
    """The folder with the program of tests/portable/driver.cpp."""

    def build(folder: Path) -> list[str]:
        files = ["-Icsrc", "tests/portable/driver.cpp", *SOURCES]
        return [CROSS, *FLAGS, *files, "-o", str(folder / "driver")]

    return _compiled(CROSS, build, {}, "driver")


def _compiled(
    compiler: str, build: Callable[[Path], list[str]], environment: dict[str, str], wanted: str
) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    command = build(Path("FOLDER"))
    digest = hashlib.sha256(repr((command, environment, version, sys.version)).encode())
    headers = sorted((ROOT / "csrc").glob("*.*"))
    for path in [ROOT / "setup.py", ROOT / "tests/portable/driver.cpp", *headers]:
        digest.update(path.read_bytes())
    for path in sorted((ROOT / "csrc/cpu").iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build/portable" / f"{compiler}_{digest.hexdigest()[:20]}"

    def make(new: Path) -> None:
        new.mkdir(exist_ok=True)
        said = programs.compile(build(new), cwd=ROOT, env=os.environ | environment)
        # setup.py's extensions are optional: it succeeds without them.
        assert list(new.glob(wanted)), said[-8000:]

    return programs.once(folder, make)


def aarch64(call: Call, threads: int) -> Saliency | Summed:
    """`cpu.execute` on an emulated processor."""
    emulator = _emulator()
    assert emulator is not None
    call = native.plain(call, wide=True)
    result = native.empty(call)
    program = [emulator, str(compiled_for_aarch64() / "driver")]
    done = subprocess.run(program, input=_encoded(call, threads), capture_output=True)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr.decode()[-2000:]}"
    read = 0
    for tensor in result:
        size = tensor.nbytes
        if size:
            piece = bytearray(done.stdout[read : read + size])
            tensor.copy_(torch.frombuffer(piece, dtype=tensor.dtype).view(tensor.shape))
        read += size
    assert read == len(done.stdout)
    return result


# As in csrc/layer.h.
_Dtype = IntEnum("_Dtype", "bf16 f16 f32", start=0)
_Activation = IntEnum("_Activation", "silu gelu gelu_tanh relu relu2 swiglu_clamped", start=0)
_NUMBERS = SimpleNamespace(
    dtypes=_Dtype.__members__,
    activations=_Activation.__members__,
)


def _encoded(call: Call, threads: int) -> bytes:
    """What driver.cpp reads: `Layer` in its order, each tensor as its bytes behind their number."""
    layer = native.layer(_NUMBERS, call, native.empty(call))  # type: ignore[arg-type]
    numbers = native.NUMBERS.unpack(layer)
    sizes, flags, parameters = numbers[:7], numbers[7:9], numbers[-3:]
    hidden_stride, gate_up, down = numbers[10], numbers[11:18], numbers[18:25]
    parts: list[Tensor | int | float | None] = [*sizes, *parameters, *flags, threads]
    parts += [hidden_stride, call.hidden_states]
    for weights, data, bias in (
        (gate_up, call.gate_up_proj, call.gate_up_bias),
        (down, call.down_proj, call.down_bias),
    ):
        parts += [*weights[1:4], *weights[5:], data, bias]
    parts += [call.top_k_index, call.top_k_weights]
    return b"".join(map(_written, parts))


def _written(part: Tensor | int | float | None) -> bytes:
    if part is None:
        return b"0\n"
    if isinstance(part, Tensor):
        memory = part.untyped_storage()  # with what strides skip
        size = memory.data_ptr() + memory.nbytes() - part.data_ptr() if part.numel() else 0
        return f"{size}\n".encode() + ctypes.string_at(part.data_ptr(), size)
    return f"{part if isinstance(part, float) else int(part)} ".encode()
