"""What the kernel says of memory: this process, the machine, and control groups of both kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from reap.errors import ReapError
from reap.runs import memory


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24G", 24 << 30),
        ("24 GiB", 24 << 30),
        ("24GB", 24_000_000_000),
        ("0.5t", 1 << 39),
        ("512m", 512 << 20),
        ("1.5e9", 1_500_000_000),
        ("700", 700),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert memory.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "24X", "1.2.3G", "0", "nan", "24GBs"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ReapError, match="is not a size: write it like 24G"):
        memory.parse_size(text)


def test_the_peak_is_of_what_came_since() -> None:
    block = torch.ones(64 << 20, dtype=torch.uint8)
    del block
    memory.give_back()
    memory.reset_peak()
    before = memory.resident()
    assert memory.peak() - before < 32 << 20
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert memory.peak() - before > 60 << 20
    assert memory.resident() - before > 60 << 20
    assert block.all() and memory.allowed() > memory.resident()


def group(folder: Path, **fields: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in fields.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.mark.parametrize("version", [1, 2])
def test_control_groups(tmp_path: Path, monkeypatch: Any, version: int) -> None:
    """The tightest of those around counts; what it keeps of files is free."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    group(proc / "self", cgroup="0::/a/b\n" if version == 2 else "7:cpu:/x\n4:memory:/a/b\n")
    group(proc, meminfo="MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n")
    group(proc / "self", status="Name: x\nVmRSS:\t 1000 kB\n")
    if version == 2:
        names = ("memory__max", "memory__current", "file")
    else:
        groups /= "memory"
        names = ("memory__limit_in_bytes", "memory__usage_in_bytes", "total_cache")

    def of(limit: int, used: int, files: int) -> dict[str, str]:
        stat = f"anon 1\n{names[2]} {files}\ninactive_file 7\n"
        return {names[0]: str(limit), names[1]: str(used), "memory__stat": stat}

    group(groups / "a/b", **({names[0]: "max"} if version == 2 else of(1 << 62, 5, 1)))
    group(groups / "a", **of(900_000_000, 500_000_000, 200_000_000))
    monkeypatch.setattr(memory, "PROC", proc)
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    assert memory.allowed() == 1_024_000 + 600_000_000
    group(groups / "a", **of(900_000_000, 950_000_000, 0))
    assert memory.allowed() == 1_024_000


def test_that_of_a_gpu(monkeypatch: Any) -> None:
    """What torch keeps for itself counts as free."""
    device = torch.device("cuda:1")
    asked: list[Any] = []

    def says(value: Any) -> Any:
        def said(one: Any) -> Any:
            asked.append(one)
            return value

        return said

    for name, value in [
        ("memory_allocated", 3), ("max_memory_allocated", 5), ("memory_reserved", 7),
        ("mem_get_info", (100, 200)), ("reset_peak_memory_stats", None),
    ]:  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, says(value))
    found = memory.meter_of(device)
    found.reset_peak()
    found.give_back()
    assert (found.resident(), found.peak(), found.allowed()) == (3, 5, 107)
    assert set(asked) == {device}
    assert memory.meter_of(torch.device("cpu")).allowed is memory.allowed
    assert memory.meter_of(None).peak is memory.peak
