"""Builds the native extensions `reap_kernels._native` (CPU) and, where there is an nvcc,
`reap_kernels._cuda`. Both are optional: the package installs all the same without a compiler, and
`reap_kernels.backends()` says why `cpu` or `cuda` is missing.

In the environment of the build:

  REAP_CUDA_ARCHS  what nvcc compiles for, in nvcc's names: sm_* is machine code, compute_* is PTX
                   that a driver compiles for every newer chip. "" leaves `cuda` out. The default is
                   CUDA_ARCHS below. No GPU is looked at.
  CUDA_HOME        where bin/nvcc is; otherwise it is looked for in PATH and /usr/local/cuda
  REAP_SANITIZE    address (with UndefinedBehaviorSanitizer) or thread: instruments `_native`; a
                   process that loads it must then preload the sanitizer's runtime library
"""

import os
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import setup
from setuptools.errors import CompileError
from setuptools.modified import newer_group

try:
    import pybind11
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext, has_flag
except ImportError:
    raise SystemExit("pybind11 is missing; build with isolation, or pip install pybind11") from None

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# csrc/cpu/<name>.cpp is the same source, compiled for one instruction set; picked at run time.
X86 = {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
SANITIZE = {
    "": ["-O3"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}
CUDA_ARCHS = "sm_80 sm_90a compute_90"
NVCC_FLAGS = "-c -O3 -std=c++17 --threads 0 -Xcompiler -fPIC,-fvisibility=hidden"
# Host code that calls device code; where a template does, nvcc says nothing and puts exit(1) there.
NVCC_FLAGS += " -Werror cross-execution-space-call"


class Build(build_ext):
    def build_extension(self, ext: Pybind11Extension) -> None:
        if ext.name.endswith("_cuda"):
            return self.build_cuda(ext)
        mode = os.environ.get("REAP_SANITIZE", "")
        ext.extra_compile_args += SANITIZE[mode]
        ext.extra_link_args += [flag for flag in SANITIZE[mode] if "sanitize" in flag]
        if mode:
            ext.define_macros.append(("REAP_OWN_THREADS", "1"))
        if sysconfig.get_platform().endswith(("x86_64", "amd64")):
            for name, flags in X86.items():
                if has_flag(self.compiler, flags[-1]):
                    ext.sources.append(f"csrc/cpu/{name}.cpp")
                    ext.define_macros.append((f"REAP_{name.upper()}", "1"))
        compile_one = self.compiler._compile

        def with_its_own_flags(  # type: ignore[no-untyped-def]
            obj, src, suffix, cc_args, extra, pp_opts
        ):
            flags = [*extra, *X86.get(Path(src).stem, [])]
            return compile_one(obj, src, suffix, cc_args, flags, pp_opts)

        self.compiler._compile = with_its_own_flags
        try:
            super().build_extension(ext)
        finally:
            self.compiler._compile = compile_one

    def build_cuda(self, ext: Pybind11Extension) -> None:
        """Everything through nvcc, which knows where its headers and its static runtime are."""
        target = Path(self.get_ext_fullpath(ext.name))
        if not self.force and not newer_group([*ext.sources, *ext.depends], target, "newer"):
            return
        archs = cuda_archs()
        names = f'-DREAP_CUDA_ARCHS="{" ".join(archs)}"'
        flags = [*NVCC_FLAGS.split(), *map(gencode, archs), names]
        for folder in (pybind11.get_include(), sysconfig.get_path("include")):
            flags += ["-isystem", folder]
        folder = Path(self.build_temp, "cuda")
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = [str(folder / f"{Path(source).name}.o") for source in ext.sources]
        commands = [
            [nvcc(), *flags, source, "-o", obj]
            for source, obj in zip(ext.sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(call, commands))
        call([nvcc(), "-shared", "-cudart", "static", *objects, "-o", str(target)])


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin"] if home else [None, "/usr/local/cuda/bin"]  # None is PATH
    return next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)


def cuda_archs() -> list[str]:
    return os.environ.get("REAP_CUDA_ARCHS", CUDA_ARCHS).split()


def gencode(arch: str) -> str:
    """sm_90a -> its PTX made into machine code; compute_90 -> its PTX as it is."""
    return f"-gencode=arch=compute_{arch.partition('_')[2]},code={arch}"


def call(command: list[str]) -> None:
    print(shlex.join(command), flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CompileError(f"nvcc cannot be run ({error})") from error
    print(done.stdout + done.stderr, end="", flush=True)
    if done.returncode:
        raise CompileError(f"nvcc failed on {command[-3]} with exit code {done.returncode}")


HEADERS = glob("csrc/**/*.h", recursive=True)
CPU = ("bindings", "isa", "layer", "portable", "routing", "team")
extensions = [
    Pybind11Extension(
        "reap_kernels._native",
        [f"csrc/cpu/{name}.cpp" for name in CPU],
        depends=HEADERS,
        cxx_std=17,
        optional=True,
    )
]
why_not = "REAP_CUDA_ARCHS is empty" if not cuda_archs() else "no nvcc in CUDA_HOME or PATH"
if cuda_archs() and nvcc():
    extensions.append(
        Pybind11Extension(
            "reap_kernels._cuda",
            [*sorted(glob("csrc/cuda/**/*.cu", recursive=True)), "csrc/cuda/bindings.cpp"],
            depends=[*HEADERS, *glob("csrc/cuda/**/*.cuh", recursive=True), "setup.py"],
            optional=True,
        )
    )
else:
    print(f"reap_kernels: the cuda backend is left out: {why_not}")
ParallelCompile().install()
setup(ext_modules=extensions, cmdclass={"build_ext": Build})
