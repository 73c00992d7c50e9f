"""Compiles csrc/cuda for GPUs that are not there, and reads what nvcc made.

    python tests/nvcc.py sm_80     # a JSON line per kernel, and Triton's main loops beside ours

The ratio is of tensor-core instructions to all others in a main loop. Each architecture is compiled
once for each state of the sources and kept in build/nvcc.
"""

import argparse
import functools
import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import offline
import programs
import sass

from reap_kernels.triton import configs

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "csrc/cuda/layer.cu"
FLAGS = ("-std=c++17", "-O3", "-cubin", "-Werror", "all-warnings,cross-execution-space-call")
LAYOUTS = ("k_major", "mn_major", "any")  # as in csrc/cuda/tiles.cuh
# Triton's config with the tile of our largest kernels: 128 rows by 128 columns by 64, four warps.
SAME_TILE = configs.Config(128, configs.Tile(64, 64, 4, 3), configs.Tile(128, 64, 4, 3))
DTYPES = {"__nv_bfloat16": "bf16", "__half": "fp16"}


class Kernel(NamedTuple):
    name: str  # without namespaces and arguments: down_kernel<bf16, 128, k_major>
    registers: int
    stack: int  # bytes, as the next two
    local: int
    static_shared: int  # beside what the launch asks for
    code: str  # from nvdisasm

    @property
    def loop(self) -> list[str]:
        return sass.main_loop(self.code)


def missing() -> str | None:
    """Why nothing can be compiled here, in one line."""
    return None if shutil.which("nvcc") else "needs nvcc, and there is none in PATH"


@functools.cache
def newest() -> str:
    """The chip with the highest number among those that nvcc knows."""
    listed = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True)
    return f"sm_{max(map(int, re.findall('compute_([0-9]+)', listed.stdout)))}"


@functools.cache
def compiled(arch: str) -> tuple[Kernel, ...]:
    """The kernels of layer.cu for one chip."""
    command = ["nvcc", *FLAGS, f"-arch={arch}", str(SOURCE)]
    sources = [*sorted((ROOT / "csrc/cuda").rglob("*.cu*")), ROOT / "csrc/layer.h"]
    version = subprocess.run(["nvcc", "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(repr((command, version)).encode())
    for source in sources:
        digest.update(source.read_bytes())
    path = ROOT / "build/nvcc" / f"{digest.hexdigest()[:20]}.cubin"

    def make(new: Path) -> None:
        if not _extract(arch, new, max(source.stat().st_mtime for source in sources)):
            programs.compile([*command, "-o", str(new)])

    return tuple(_kernels(programs.once(path, make)))


def _extract(arch: str, target: Path, changed: float) -> bool:
    """Takes the machine code from the installed extension, if that is newer than the sources."""
    for built in ROOT.glob("reap_kernels/_cuda.*.so"):
        if built.stat().st_mtime > changed:
            with tempfile.TemporaryDirectory() as folder:
                sass.tool("cuobjdump", "-xelf", f"{arch}.cubin", str(built), cwd=folder)
                for found in Path(folder).iterdir():
                    shutil.move(found, target)
                    return True
    return False


def _kernels(cubin: Path) -> list[Kernel]:
    usage = sass.tool("cuobjdump", "--dump-resource-usage", str(cubin))
    used = {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
        for name, numbers in re.findall(r"Function (\w+):\s*\n\s*(.*)", usage)
    }
    code = re.split(
        r"^\s*\.section\s+\.text\.(\w+),.*$", sass.tool("nvdisasm", "-c", str(cubin)), flags=re.M
    )
    sections = dict(zip(code[1::2], code[2::2], strict=True))
    names = subprocess.run(
        ["c++filt"], input="\n".join(used), capture_output=True, text=True, check=True
    )
    return [
        Kernel(short(name), of["REG"], of["STACK"], of["LOCAL"], of["SHARED"], sections[mangled])
        for name, (mangled, of) in zip(names.stdout.splitlines(), used.items(), strict=True)
    ]  # fmt: skip


def short(name: str) -> str:
    """A demangled name as `Kernel` has it."""
    name = re.sub(r"\(reap::cuda::Layout\)(\d)", lambda found: LAYOUTS[int(found[1])], name)
    name = name.removeprefix("void ").partition("(")[0].replace("reap::cuda::", "")
    for long, short in DTYPES.items():
        name = name.replace(long, short)
    return name


def triton_tile(arch: str, config: configs.Config) -> list[dict]:
    """Triton's gate_up and down for a layer of Qwen3-30B-A3B in these tiles."""
    return list(offline.gemms(arch, config, offline.VARIANTS[16][0]))


def report(arch: str) -> Iterator[dict]:
    for kernel in compiled(arch):
        share = sass.share(kernel.loop)
        yield {"by": "nvcc", "kernel": kernel.name, "registers": kernel.registers} | share
    chip = arch.rstrip("a")
    if chip not in offline.CHIPS:
        return
    choices = configs.CHOICES[offline.CHIPS[chip][0]]
    shipped = [each.config for each in choices if each.bits == 16 and not each.unaligned][-1]
    for config in (SAME_TILE, shipped):
        for row in triton_tile(chip, config):
            yield {
                "by": "triton",
                "kernel": row["kernel"],
                "registers": row["registers"],
                "spills": row["spills"],
                "config": row["config"],
            } | row["loop"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("arch", help="such as sm_80 or sm_90a")
    for row in report(parser.parse_args().arch):
        print(json.dumps(row), flush=True)
