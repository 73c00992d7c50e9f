"""One table of a run: layers with every implementation in a column, whole models, tests, stages."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

FIGURES = (
    "ms", "x floor", "TFLOP/s", "alone ms", "host ms", "x grouped_mm", "extra MB", "MHz", "W",
)  # fmt: skip


def show(content: dict[str, Any], console: Console | None = None) -> None:
    """Of whatever is there: a stage that failed leaves its lines out."""
    console = console or Console(width=None if sys.stdout.isatty() else 200)
    stages = content["stages"]
    facts = (stages.get("facts") or {}).get("result") or {}
    gpu = facts.get("gpu") or {}
    versions = facts.get("versions") or {}
    shown = [f"{name} {versions.get(name)}" for name in ("torch", "triton", "transformers")]
    title = ", ".join([gpu.get("name", "no GPU"), *shown, f"commit {facts.get('commit')}"])
    console.print(title, highlight=False)
    made = Table(title_justify="left")
    made.add_column("what", no_wrap=True)
    made.add_column("impl", no_wrap=True)
    for name in FIGURES:
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("longest kernels, ms")
    before = None
    for row in rows(stages):
        what = f"{row['bench']} {row['dtype']} {row['shape'].split()[0]} T={row['T']:,}"
        what += " even" if row["routing"] == "even" else ""
        if before not in (None, what):
            made.add_section()
        made.add_row("" if what == before else escape(what), *map(escape, _cells(row)))
        before = what
    if before is not None:
        console.print(made)
    for line in _stage_lines(stages):
        console.print(escape(line), highlight=False)


def rows(stages: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Of all benches, in order."""
    found = []
    for outcome in stages.values():
        result = outcome.get("result")
        for row in result if isinstance(result, list) else [result]:
            if isinstance(row, dict) and "ms_median" in row:
                found.append(row)
    return found


def _cells(row: dict[str, Any]) -> list[str]:
    ms, floor, extra = row["ms_median"], row["floor_ms"], row["extra_bytes"]
    kernels = sorted(row["kernels"].items(), key=lambda item: -item[1])[:3]
    return [
        row["impl"],
        f"{ms:,.4g}" + ("" if row["method"] in ("graph", None) else " (events)"),
        "" if floor is None else f"{ms / floor:.2f}",
        "" if row["gflops"] is None else f"{row['gflops'] / 1e3:,.4g}",
        _number(row["alone_ms"], ".4g"),
        _number(row["host_ms"], ".3g"),
        _number(_of_grouped(row["speedup_vs"]), ".2f"),
        "" if extra is None else f"{extra / 1e6:,.0f}",
        _number(row["clock_mhz"], ".0f"),
        _number(row["power_w"], ".0f"),
        ", ".join(f"{short(name)} {ms:.3g}" for name, ms in kernels),
    ]


def _of_grouped(speedups: dict[str, float]) -> float | None:
    """How many times as fast as transformers' own, of a layer or of a model without its head."""
    return speedups.get("grouped_mm", speedups.get("grouped_mm without head"))


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def short(kernel: str) -> str:
    """`void reap::cuda::down_kernel<__nv_bfloat16, 128>(...)` -> `down_kernel`"""
    name = kernel.removeprefix("void ").partition("<")[0].partition("(")[0]
    return name.rpartition("::")[2][:28]


def _stage_lines(stages: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, outcome in stages.items():
        result = outcome.get("result")
        counts = result.get("counts") if isinstance(result, dict) else None
        said = f" {counts}" if counts else ""
        said += f", {outcome['why']}" if "why" in outcome else ""
        lines.append(f"{name:10} {outcome['state']:8} {outcome['seconds']:6} s{said}")
        if isinstance(result, dict):
            lines += [f"    missing {text}" for text in result.get("missing", [])]
            lines += [f"    {w['outcome']}: {w['test']}" for w in result.get("wrong", []) if counts]
    return lines
