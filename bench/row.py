"""The one row that every suite writes, and the files it goes to."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One implementation at one size. A figure that was not or cannot be measured is None."""

    bench: str  # suite
    impl: str  # what ran: `reap:BACKEND` is ours, everything else a peer or a roof
    dtype: str  # bf16, fp32 or fp16; "-" where no arithmetic is done
    shape: str  # `Shape` as text for layers and models, words elsewhere
    T: int  # tokens per call; 0 where there are none
    routing: str | None  # of the tokens to experts: see inputs.ROUTINGS
    ms_median: float  # per call, over the rounds of one run; on a GPU its own time [ms]
    ms_p20: float
    ms_p80: float
    method: str | None  # of a GPU's time: replayed as a "graph", or "events" around the call
    alone_ms: float | None  # of one call on an idle GPU, by events: what the host does not hide
    host_ms: float | None  # until a call to a GPU returns
    floor_ms: float | None  # the slower of the layer's FLOPs and bytes, at the GPU maker's rates
    gflops: float | None  # needed FLOPs (README) / ms_median [GFLOP/s]
    fraction_of_peak: float | None  # gflops / FMA peak measured in the same rounds (README)
    extra_bytes: int | None  # peak resident memory of one call above what was there before it
    speedup_vs: dict[str, float]  # {peer: its ms_median / ours}, from the same rounds
    clock_mhz: float | None  # of the GPU while it ran
    power_w: float | None  # of the GPU while this size ran: the driver averages a second
    kernels: dict[str, float]  # a GPU's longest, by name [ms per call]
    machine: str  # processor, threads, memory
    versions: dict[str, str]  # of what ran

    @classmethod
    def from_json(cls, line: str) -> Row:
        return cls(**json.loads(line))


COLUMNS = tuple(field.name for field in fields(Row))


class Log:
    """Appends rows to `rows.jsonl` and `rows.csv` in a folder, whole lines only."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.jsonl, self.csv = folder / "rows.jsonl", folder / "rows.csv"
        header = ",".join(COLUMNS)
        if self.csv.exists() and (found := self.csv.read_text().partition("\n")[0]):
            if found != header:
                raise ValueError(f"{self.csv} has the columns {found}, not {header}: move it away")
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        values = asdict(row)
        _append(self.jsonl, json.dumps(values, allow_nan=False))
        _append(self.csv, _csv_line(values), header=",".join(COLUMNS))
        self.rows.append(row)


def _csv_line(values: dict[str, Any]) -> str:
    cells = [json.dumps(v) if isinstance(v, dict) else v for v in values.values()]
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(cells)
    return line.getvalue()


def _append(path: Path, line: str, header: str | None = None) -> None:
    """One write per line under a lock: two runs on one folder, or a kill, tear no line."""
    with open(path, "ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if header is not None and os.fstat(file.fileno()).st_size == 0:
            line = f"{header}\n{line}"
        file.write(f"{line}\n".encode())


@cache
def _hardware() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    isa = []
    if cpuinfo.exists():
        facts = dict(
            (key.strip(), value.strip())
            for key, _, value in (line.partition(":") for line in cpuinfo.read_text().splitlines())
        )
        model = facts.get("model name", model)
        flags = facts.get("flags", facts.get("Features", "")).split()
        isa = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model} ({', '.join(isa) or platform.machine()}), {memory:.0f} GiB"


def machine(device: str = "cpu") -> str:
    """Processor, instruction sets that matter here, memory, and the threads that torch uses now; or
    the GPU."""
    import torch

    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return f"{_hardware()}, {torch.get_num_threads()} threads"


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    found = {"python": platform.python_version()}
    for package in ("reap-saliency", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    try:
        found["commit"] = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass  # not a git checkout: the versions above say what they can
    return tuple(found.items())


def versions() -> dict[str, str]:
    return dict(_versions())
