"""Builds the native extension `reap_kernels._native` if it can. It is optional: without a C++
compiler the package installs all the same and `reap_kernels.backends()` says why `cpu` is missing.

REAP_SANITIZE=address (with UndefinedBehaviorSanitizer) or =thread in the environment of the build
instruments it; a process that loads it must then preload the sanitizer's runtime library.
"""

import os
import platform
from glob import glob
from pathlib import Path

from setuptools import setup

try:
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


class Build(build_ext):
    def build_extension(self, ext: Pybind11Extension) -> None:
        mode = os.environ.get("REAP_SANITIZE", "")
        ext.extra_compile_args += SANITIZE[mode]
        ext.extra_link_args += [flag for flag in SANITIZE[mode] if "sanitize" in flag]
        if mode:
            ext.define_macros.append(("REAP_OWN_THREADS", "1"))
        if platform.machine().lower() in ("x86_64", "amd64"):
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
        super().build_extension(ext)


extension = Pybind11Extension(
    "reap_kernels._native",
    ["csrc/bindings.cpp", *(f"csrc/cpu/{name}.cpp" for name in ("isa", "moe", "team", "portable"))],
    depends=glob("csrc/**/*.h", recursive=True),
    cxx_std=17,
    optional=True,
)
ParallelCompile().install()
setup(ext_modules=[extension], cmdclass={"build_ext": Build})
