"""Builds what a release consists of, and tries each part as a stranger would: in a clean
environment, without a compiler, on a small model.

    python tools/release_check.py out/release     # minutes; `make release-check`

The sdist comes first and the wheels are built from it, so that a file which it lacks shows. Wheels
with CPU kernels get their manylinux tag from auditwheel; the one with CUDA kernels lies in a folder
of its own, because both have one name.

A wheel is for one Python. Those for `--pythons` run one layer without torch (one_layer.py): torch
for CPUs alone is not on every index. So does the one for aarch64, which a cross compiler makes and
an emulator runs with the Python in the folder `--aarch64`. On Debian, as root:

    apt-get install g++-aarch64-linux-gnu qemu-user-static debootstrap
    debootstrap --arch=arm64 --foreign --include=python3,libstdc++6 bookworm ROOT
    for deb in ROOT/var/cache/apt/archives/*.deb; do dpkg -x $deb ROOT; done
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "tiny-qwen3-moe"
MOST_BYTES = 32 << 20  # of the sdist
CROSS = "aarch64-linux-gnu-"
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false", "PYTHONPATH": ""}


def run(*command: object, **environment: str) -> str:
    """What it printed. Ends the check where it fails."""
    words = [str(word) for word in command]
    print("+", *words, flush=True)
    env = {**os.environ, **environment}
    done = subprocess.run(words, env=env, capture_output=True, text=True, cwd="/")
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\nfailed: {' '.join(words)}")
    return done.stdout


def release() -> str:
    """The version, which the top entry of the change log has too."""
    (version,) = re.findall(r'^OWN = "(.+)"', (ROOT / "reap/versions.py").read_text(), re.M)
    (latest, *_) = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    if version != latest:
        sys.exit(f"reap/versions.py says {version}, the top of CHANGELOG.md {latest}")
    return version


def sdist(out: Path) -> tuple[Path, Path]:
    """The archive, and the folder of its files."""
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out, ROOT)
    (made,) = out.glob("*.tar.gz")
    if made.stat().st_size > MOST_BYTES:
        sys.exit(f"{made} has {made.stat().st_size:,} bytes: more than {MOST_BYTES:,}")
    with tarfile.open(made) as archive:
        archive.extractall(out / "source", filter="data")
    (source,) = (out / "source").iterdir()
    return made, source


def wheel(python: object, source: Path, out: Path, **environment: str) -> Path:
    """Built by that Python from the sdist's files, into a new folder."""
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, source,
        **environment)  # fmt: skip
    (made,) = out.glob("*.whl")
    return made


def for_many(made: Path, out: Path) -> Path:
    """With the manylinux tag of what it needs of the system."""
    folder = made.parent / "many"
    run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", folder, made)
    (repaired,) = folder.glob("*manylinux*.whl")
    return repaired.rename(out / repaired.name)


def environment(place: Path) -> Path:
    """A fresh one, in which torch lies already: a build for CPUs, where the index has one."""
    run(sys.executable, "-m", "venv", place)
    run(*pip_install(place), "torch", **NO_COMPILER)
    return place


def pip_install(place: Path) -> list[object]:
    return [place / "bin/python", "-m", "pip", "install", "--quiet", "--constraint",
            ROOT / "constraints.txt"]  # fmt: skip


def try_out(made: Path, place: Path, expected: dict[str, str | None]) -> None:
    """Install it in place of what was there and prune a model. `expected`: backend -> a part of the
    reason why it is not available, None where it is."""
    bare = {**NO_COMPILER, "PATH": str(place / "bin")}
    run(place / "bin/python", "-m", "pip", "uninstall", "--quiet", "--yes", "reap-saliency")
    # pip would keep what it builds from an archive under the archive's name.
    run(*pip_install(place), "--no-cache-dir", made, REAP_CUDA_ARCHS="", **NO_COMPILER)
    reap = place / "bin/reap"
    about = json.loads(run(reap, "doctor", "--json", **bare))
    for backend, reason in expected.items():
        found = about["backends"][backend]
        if (found is None) != (reason is None) or (reason is not None and reason not in found):
            sys.exit(f"{made.name}: backend {backend}: {found or 'available'}, not as expected")
    results = place / "results"  # the model, and files beside it
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir()
    pruned = results / "pruned"
    words = [reap, "compress", MODEL, pruned, "--data", "stdlib:code", "--max-tokens", 1024]
    run(*words, "--ratio", 0.5, **bare)
    run(reap, "verify", pruned, "--source", MODEL, **bare)


def try_layer(made: Path, python: object, place: Path) -> None:
    """One layer on another Python, with nothing but numpy."""
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", place]
    run(*install, "numpy", made, **NO_COMPILER)
    print(run(python, ROOT / "tools/one_layer.py", place, PYTHONPATH=str(place)), end="")


def for_aarch64(source: Path, out: Path, root: Path) -> Path | None:
    """The wheel for this Python there, tried under an emulator; None, and why, without the tools.

    Headers of Python are this one's: 64-bit Linux has them alike."""
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if not emulator or not shutil.which(f"{CROSS}g++"):
        print(f"aarch64 is left out: it needs {CROSS}g++ and qemu-aarch64 in PATH")
        return None
    suffix = sysconfig.get_config_var("EXT_SUFFIX").replace(platform.machine(), "aarch64")
    there = {"_PYTHON_HOST_PLATFORM": "linux-aarch64", "SETUPTOOLS_EXT_SUFFIX": suffix}
    there |= {"CC": f"{CROSS}gcc", "CXX": f"{CROSS}g++", "REAP_CUDA_ARCHS": ""}
    made = for_many(wheel(sys.executable, source, out / "aarch64", **there), out)
    place, python = out / "layer-aarch64", f"python{sys.version_info[0]}.{sys.version_info[1]}"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", place,
        "--platform", made.stem.split("-")[-1], "--platform", "manylinux_2_28_aarch64",
        "--only-binary", ":all:", "numpy", made)  # fmt: skip
    words = [emulator, "-L", root, root / "usr/bin" / python, ROOT / "tools/one_layer.py", place]
    print(run(*words, PYTHONPATH=str(place)), end="")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--no-cuda", action="store_true", help="leave that wheel out")
    parser.add_argument("--pythons", nargs="*", default=[], help="others to build a wheel for")
    parser.add_argument("--aarch64", type=Path, metavar="ROOT", help="see above")
    given = parser.parse_args()
    out = given.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    version = release()
    archive, source = sdist(out)
    cpu = for_many(wheel(sys.executable, source, out / "plain", REAP_CUDA_ARCHS=""), out)
    clean = environment(out / "clean")
    try_out(cpu, clean, {"cpu": None, "cuda": "not built"})
    try_out(archive, clean, {"cpu": "not built", "cuda": "not built"})
    made = [archive, cpu]
    for number, python in enumerate(given.pythons):
        each = for_many(wheel(python, source, out / f"plain-{number}", REAP_CUDA_ARCHS=""), out)
        try_layer(each, python, out / f"layer-{number}")
        made.append(each)
    if given.aarch64 and (there := for_aarch64(source, out, given.aarch64.resolve())):
        made.append(there)
    if not given.no_cuda:
        cuda = wheel(sys.executable, source, out / "cuda")
        try_out(cuda, clean, {"cpu": None, "cuda": "this torch is built for CPUs only"})
        made.append(cuda)
    for each in made:
        print(f"{version}: {each} {each.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
