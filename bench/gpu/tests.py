"""Runs the tests marked `gpu` in processes that may die: each has its share, and is started again
for what it has left. Nothing compiles here but Triton.

    python -m bench.gpu.tests RESULT SECONDS PROCESSES [FOLDER]
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.gpu import stages

ROOT = Path(__file__).resolve().parent.parent.parent
RESTARTS = 6
MARKED = re.compile(r"\bmark\.gpu\b")
GOOD = ("passed", "skipped")
NONE_LEFT = 5  # pytest's exit code


def files(folder: Path) -> list[str]:
    """Test modules with a test for a GPU: the others would be imported for nothing."""
    found = sorted(folder.glob("test_*.py"))
    return [str(path) for path in found if MARKED.search(path.read_text())]


def share(part: int, parts: int, folder: Path, results: Path, until: float) -> None:
    """One share to its end: a crash costs the test that was running, a hang the rest."""
    env = {**os.environ, "REAP_SHARE": f"{part}/{parts}", "REAP_RESULTS": str(results)}
    paths = [str(ROOT), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu.plugin", "-p"]
    command += ["no:cacheprovider", "-m", "gpu and not slow", "--continue-on-collection-errors"]
    for _ in range(RESTARTS):
        left = until - time.monotonic()
        if left < 1:
            _put(results, f"share {part}", "error", "no time was left to start it again")
            return
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                [*command, *files(folder)],
                cwd=folder.parent,
                env=env,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout=left)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                stages.end(process)
            output.seek(0)
            said = output.read().decode(errors="replace")[-1500:]
        running = _unfinished(results)
        for test in running:
            why = "still ran at the end of the time" if code is None else f"died with {code}"
            _put(results, test, "crashed", f"{why}: {said}")
        if code is None:
            if not running:
                _put(results, f"share {part}", "error", f"was late: {said}")
            return
        if code in (0, 1, NONE_LEFT):
            return
        if not running and code > 1 and not _lines(results):
            _put(results, f"share {part}", "error", f"pytest ended with {code}: {said}")
            return
    _put(results, f"share {part}", "error", f"was started {RESTARTS} times and not again")


def _lines(results: Path) -> list[dict[str, Any]]:
    return stages.read(results) or [] if results.exists() else []


def _unfinished(results: Path) -> list[str]:
    lines = _as_list(_lines(results))
    ended = {line["test"] for line in lines if "test" in line}
    return [line["started"] for line in lines if line.get("started", "") not in ended | {""}]


def _as_list(found: Any) -> list[dict[str, Any]]:
    return found if isinstance(found, list) else [found]


def _put(results: Path, test: str, outcome: str, message: str) -> None:
    with open(results, "a") as file:
        line = {"test": test, "outcome": outcome, "seconds": 0, "message": message}
        file.write(json.dumps(line) + "\n")


def collected(paths: list[Path]) -> Iterator[dict[str, Any]]:
    """A line per test. A test module that cannot be imported is told by every share, and is one
    line here."""
    seen: set[str] = set()
    for path in paths:
        for line in _as_list(_lines(path)):
            if "test" in line and not (line["outcome"] == "error" and line["test"] in seen):
                seen.add(line["test"])
                yield line


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts by module and outcome, and all that is not right in full."""
    modules: dict[str, Counter[str]] = {}
    for line in lines:
        module = line["test"].partition("::")[0]
        modules.setdefault(module, Counter())[line["outcome"]] += 1
    return {
        "counts": dict(Counter(line["outcome"] for line in lines)),
        "modules": {name: dict(counts) for name, counts in modules.items()},
        "wrong": [line for line in lines if line["outcome"] not in GOOD],
        "slowest": sorted(lines, key=lambda line: -line["seconds"])[:10],
        "skipped": dict(Counter(x["message"] for x in lines if x["outcome"] == "skipped")),
    }


def main(path: Path, seconds: float, processes: int, folder: Path = ROOT / "tests") -> int:
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as place:
        results = [Path(place) / f"share{part}" for part in range(processes)]
        with ThreadPoolExecutor(processes) as pool:
            shares = [
                pool.submit(share, part, processes, folder, results[part], until)
                for part in range(processes)
            ]
            while not all(one.done() for one in shares):  # partial results, if this is ended
                time.sleep(0.2)
                _write(path, summary(list(collected(results))))
            for one in shares:
                one.result()
        found = summary(list(collected(results)))
    _write(path, found)
    print(found["counts"])
    for line in found["wrong"][:20]:
        print(f"{line['outcome']}: {line['test']}\n    {line['message'][-300:]}")
    return 0 if not found["wrong"] and found["counts"].get("passed") else 1


def _write(path: Path, found: dict[str, Any]) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(found))
    new.replace(path)


if __name__ == "__main__":
    result, limit, count, *where = sys.argv[1:]
    sys.exit(main(Path(result), float(limit), int(count), *map(Path, where)))
