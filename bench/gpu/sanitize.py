"""`make gpu-sanitize`: compute-sanitizer's four tools over small calls of each backend.

    python -m bench.gpu.sanitize [--out FOLDER] [--seconds 170]

Only our kernels are instrumented, by their names: torch's would take minutes, and are not ours.
Each tool must first find a fault that was planted for it, through the same filters.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.gpu import facts, stages
from bench.gpu.small import BACKENDS

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Parts of mangled names. Triton's kernels have those of their functions; what torch writes into
# their buffers must be seen as well, or initcheck takes it for uninitialized.
TRITON = ("route_kernel", "count_kernel", "scan_kernel", "place_kernel", "gate_up_kernel",
          "down_kernel", "finish_kernel", "FillFunctor")  # fmt: skip
KERNELS = {"cuda": ("reap",), "cuda_sm90": ("reap",), "triton": TRITON}
PLANTED = Path(__file__).with_name("planted.cu")
MOST_PROCESSES = 12
FOUND = 86  # the exit code that stands for errors
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
KINDS = re.compile(r"^=+ (?:Invalid|Uninitialized|Error|Warning|Barrier).*", flags=re.M)
ENVIRONMENT = {
    # Every tensor has memory of its own, so that a step outside of it is one.
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    "CUDA_MODULE_LOADING": "LAZY",
    "HF_HUB_OFFLINE": "1",
    "TRITON_INTERPRET": "0",
}

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def filters(backend: str, said: str) -> list[str]:
    """The option that names kernels was --kernel-regex until 2023; `said` is what --help prints."""
    option = "--kernel-name" if "--kernel-name" in said else "--kernel-regex"
    return [word for name in KERNELS[backend] for word in (option, f"kns={name}")]


def command(program: str, tool: str, backend: str, said: str) -> list[str]:
    """compute-sanitizer with a tool, over the kernels of a backend; what runs comes after it."""
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    if "--target-processes" in said:  # Triton starts compilers
        options += ["--target-processes", "application-only"]
    if "--report-api-errors" in said:  # libraries ask for what a driver may not have
        options += ["--report-api-errors", "no"]
    return [program, *options, *filters(backend, said)]


def small(backend: str) -> list[str]:
    return [sys.executable, "-m", "bench.gpu.small", backend]


def plant(folder: Path, log: Path) -> Path | None:
    """The program with the faults; None if it cannot be compiled, for reasons in `log`."""
    made = folder / "planted"
    with open(log, "wb") as output:
        nvcc = facts.program("nvcc")
        if nvcc is None:
            output.write(b"nvcc is missing")
            return None
        words = [nvcc, "-arch=native", "-o", str(made), str(PLANTED)]
        done = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT, timeout=60)
    return made if done.returncode == 0 else None


def control(outcome: dict[str, Any]) -> dict[str, Any]:
    """Of a run over a planted fault: right if it was found."""
    if outcome["state"] == "errors":
        return outcome | {"state": "ok", "line": "finds the planted fault"}
    return outcome | {"state": "blind", "line": f"misses the planted fault: {outcome['line']}"}


def verdict(code: int | None, log: str) -> tuple[str, str]:
    """ok, or what is wrong; and a line about it."""
    cases = len(re.findall(r"^done ", log, flags=re.M))
    errors = sum(map(int, SUMMARY.findall(log)))
    if errors or code == FOUND:
        named = KINDS.findall(log)
        return "errors", f"{errors} errors in {cases} cases: {'; '.join(named[:3])}"
    if code is None:
        return "timeout", f"{cases} cases without an error until then"
    if code or not cases or "all done" not in log:
        last = (log.strip().splitlines() or [""])[-1]
        return "failed", f"ended with {code} after {cases} cases: {last[:300]}"
    return "ok", f"{cases} cases"


def check(words: list[str], log: Path, until: float) -> dict[str, Any]:
    start = time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout=max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stages.end(process)
    state, line = verdict(code, log.read_text(errors="replace"))
    seconds = round(time.monotonic() - start, 1)
    return {"state": state, "line": line, "seconds": seconds, "log": str(log)}


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="folder of logs")] = Path("out/gpu-sanitize"),
    seconds: Annotated[float, typer.Option(help="in all")] = 170.0,
    only: Annotated[str, typer.Option(help="backends, by comma")] = ",".join(BACKENDS),
) -> None:
    """Look for memory errors and races in every kernel, on a GPU."""
    until = time.monotonic() + seconds
    program = facts.program("compute-sanitizer")
    if program is None:
        sys.exit("compute-sanitizer is missing: it comes with the CUDA toolkit")
    done = subprocess.run([program, "--help"], capture_output=True, text=True)
    said = done.stdout + done.stderr
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    backends = only.split(",")
    for backend in backends:  # compiles what Triton needs, and must work without a tool
        found[f"{backend} alone"] = check(small(backend), out / f"{backend}-alone.log", until)
        _tell(f"{backend} alone", found, out)
    planted = plant(out, out / "planted.log")
    runs = {}
    for backend in backends:
        for tool in TOOLS:
            words = command(program, tool, backend, said)
            if planted is not None:
                runs[f"{backend} {tool} planted"] = [*words, str(planted), tool]
            if found[f"{backend} alone"]["state"] == "ok":
                runs[f"{backend} {tool}"] = [*words, *small(backend)]
    if planted is None:
        line = "no fault could be planted, so that clean results mean nothing: see planted.log"
        found["planted"] = {"state": "failed", "line": line, "seconds": 0}
        _tell("planted", found, out)
    with ThreadPoolExecutor(MOST_PROCESSES) as pool:
        futures = {
            name: pool.submit(check, words, out / f"{name.replace(' ', '-')}.log", until)
            for name, words in sorted(runs.items(), key=lambda run: "planted" not in run[0])
        }
        for name, future in futures.items():
            outcome = future.result()
            found[name] = control(outcome) if "planted" in name else outcome
            _tell(name, found, out)
    sys.exit(any(each["state"] != "ok" for each in found.values()))


def _tell(name: str, found: dict[str, dict[str, Any]], out: Path) -> None:
    each = found[name]
    print(f"{name:28} {each['state']:8} {each['seconds']:6} s  {each['line']}", flush=True)
    (out / "sanitize.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    app()
