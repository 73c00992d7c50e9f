"""Reads machine code of NVIDIA GPUs with the tools in triton's wheel."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TENSOR = re.compile(r"(?:HMMA|HGMMA|UTC\w*MMA)\b")


def tool(name: str, *arguments: str, cwd: str | None = None) -> str:
    command = [str(TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd).stdout


def instructions(code: str) -> list[str]:
    """Of the text of one kernel from `nvdisasm -c`."""
    return re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.+?)\s*;", code, re.M)


def loops(code: str) -> Iterator[list[str]]:
    """The instructions of each loop: from a label to a jump back there. `code`: of one kernel, from
    `nvdisasm -c`."""
    labels: dict[str, int] = {}
    seen: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(seen)
        for instruction in instructions(line):
            seen.append(instruction)
            target = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction)
            if target and target[1] in labels:
                yield seen[labels[target[1]] :]


def main_loop(code: str) -> list[str]:
    """The loop with the most tensor-core instructions; of several the smallest one. Empty if no
    loop has any."""
    best = max(loops(code), key=lambda loop: (_tensor(loop), -len(loop)), default=[])
    return best if _tensor(best) else []


def _tensor(loop: list[str]) -> int:
    return sum(bool(TENSOR.search(each)) for each in loop)


def share(loop: list[str]) -> dict[str, float]:
    """Tensor-core instructions of a loop, all its other ones (NOPs too), and their ratio."""
    tensor = _tensor(loop)
    others = len(loop) - tensor
    return {"tensor": tensor, "others": others, "ratio": round(tensor / others, 2)} if loop else {}
