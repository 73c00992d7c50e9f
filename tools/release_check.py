"""Builds what a release consists of, and tries each part as a stranger would: in a clean
environment, without a compiler, on a small model.

    python tools/release_check.py out/release     # minutes; `make release-check`

The sdist comes first and the wheels are built from it, so that a file which it lacks shows. The
wheel with CPU kernels gets its manylinux tag from auditwheel; the one with CUDA kernels lies in a
folder of its own, because both have one name.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "tiny-qwen3-moe"
MOST_BYTES = 32 << 20  # of the sdist


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


def sdist(out: Path) -> Path:
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out, ROOT)
    (made,) = out.glob("*.tar.gz")
    if made.stat().st_size > MOST_BYTES:
        sys.exit(f"{made} has {made.stat().st_size:,} bytes: more than {MOST_BYTES:,}")
    with tarfile.open(made) as archive:
        archive.extractall(out / "source", filter="data")
    (source,) = (out / "source").iterdir()
    return source


def wheel(source: Path, out: Path, archs: str | None) -> Path:
    """Built from the sdist's files, with CUDA kernels for `archs` (None: as setup.py has it)."""
    environment = {} if archs is None else {"REAP_CUDA_ARCHS": archs}
    run(sys.executable, "-m", "build", "--wheel", "--outdir", out, source, **environment)
    (made,) = out.glob("*.whl")
    return made


def for_many(made: Path, out: Path) -> Path:
    """With the manylinux tag of what it needs of the system."""
    run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", out, made)
    (repaired,) = out.glob("*manylinux*.whl")
    return repaired


def try_out(made: Path, place: Path, expected: dict[str, str | None]) -> None:
    """Install it in a fresh environment and prune a model there. `expected`: backend -> a part of
    the reason why it is not available, None where it is."""
    run(sys.executable, "-m", "venv", place)
    pip = [place / "bin/python", "-m", "pip", "install", "--quiet"]
    pip += ["--constraint", ROOT / "constraints.txt"]
    bare = {"PATH": str(place / "bin"), "CC": "/bin/false", "CXX": "/bin/false", "PYTHONPATH": ""}
    run(*pip, "torch", **bare)
    run(*pip, made, **bare)
    reap = place / "bin/reap"
    about = json.loads(run(reap, "doctor", "--json", **bare))
    for backend, reason in expected.items():
        found = about["backends"][backend]
        if (found is None) != (reason is None) or (reason is not None and reason not in found):
            sys.exit(f"{made.name}: backend {backend}: {found or 'available'}, not as expected")
    pruned = place / "pruned"
    words = [reap, "compress", MODEL, pruned, "--data", "stdlib:code", "--max-tokens", 8192]
    run(*words, "--ratio", 0.5, **bare)
    run(reap, "verify", pruned, "--source", MODEL, **bare)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--no-cuda", action="store_true", help="leave that wheel out")
    given = parser.parse_args()
    out = given.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    version = release()
    source = sdist(out)
    cpu = for_many(wheel(source, out / "plain", ""), out)
    try_out(cpu, out / "env-cpu", {"cpu": None, "cuda": "not built"})
    made = [cpu]
    if not given.no_cuda:
        cuda = wheel(source, out / "cuda", None)
        try_out(cuda, out / "env-cuda", {"cpu": None, "cuda": "this torch is built for CPUs only"})
        made.append(cuda)
    for each in (*out.glob("*.tar.gz"), *made):
        print(f"{version}: {each} {each.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
