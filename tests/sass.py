"""Reads machine code of NVIDIA GPUs with the tools in triton's wheel."""

import re
import subprocess
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


def main_loop(code: str) -> list[str]:
    """The instructions of the loop with the most tensor-core instructions; of several the
    smallest one. Empty if no loop has any. `code`: of one kernel, from `nvdisasm -c`."""
    return max(loops(code), key=lambda loop: (_tensor(loop), -len(loop)), default=[])


def inner_loops(code: str) -> list[list[str]]:
    """The loops with tensor-core instructions that have no other such loop in them. (Of those with
    the same ones, the smallest: others end in code that was moved to the kernel's end.)"""
    smallest: dict[frozenset[int], list[str]] = {}
    for first, body in _tensor_loops(code):
        tensor = frozenset(first + i for i, each in enumerate(body) if TENSOR.search(each))
        smallest[tensor] = min(body, smallest.get(tensor, body), key=len)
    return [body for places, body in smallest.items() if not any(x < places for x in smallest)]


def loops(code: str) -> list[list[str]]:
    """The instructions of each loop with tensor-core instructions: from a label to a jump back."""
    return [body for _, body in _tensor_loops(code)]


def _tensor_loops(code: str) -> list[tuple[int, list[str]]]:
    """Where each loop with tensor-core instructions begins, and its instructions."""
    labels: dict[str, int] = {}
    seen: list[str] = []
    found: list[tuple[int, list[str]]] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(seen)
        for instruction in instructions(line):
            seen.append(instruction)
            target = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction)
            if target and target[1] in labels:
                first = labels[target[1]]
                found.append((first, seen[first:]))
    return [(first, body) for first, body in found if _tensor(body)]


def _tensor(loop: list[str]) -> int:
    return sum(bool(TENSOR.search(each)) for each in loop)


def share(loop: list[str]) -> dict[str, float]:
    """Tensor-core instructions of a loop, all its other ones (NOPs too), and their ratio."""
    tensor = _tensor(loop)
    others = len(loop) - tensor
    return {"tensor": tensor, "others": others, "ratio": round(tensor / others, 2)} if loop else {}
