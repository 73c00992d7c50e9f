"""Builds both extensions in place, for the chip of this machine alone, and loads them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from bench.gpu import facts

CHECK = "from reap_kernels import native; import sys; sys.exit(native.missing({name!r}))"


def arch(sm: int) -> str:
    """In nvcc's names; sm_90's own instructions are those of sm_90a."""
    return "sm_90a" if sm == 90 else f"sm_{sm}"


def main(device: str, path: Path) -> int:
    archs = arch(facts.gpu()["sm"]) if device == "cuda" else ""
    env = {**os.environ, "REAP_CUDA_ARCHS": archs}
    if nvcc := facts.program("nvcc"):
        env.setdefault("CUDA_HOME", str(Path(nvcc).parent.parent))
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "-j", "2"], env=env
    )
    wrong = [f"setup.py ended with {done.returncode}"] if done.returncode else []
    wanted = ("_native", "_cuda") if device == "cuda" else ("_native",)
    for name in wanted:  # they are optional: setup.py succeeds without them
        loaded = subprocess.run(
            [sys.executable, "-c", CHECK.format(name=name)], capture_output=True, text=True
        )
        if loaded.returncode:
            wrong.append(f"{name}: {loaded.stderr.strip()[-500:]}")
    path.write_text(json.dumps({"archs": archs, "wrong": wrong}))
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
