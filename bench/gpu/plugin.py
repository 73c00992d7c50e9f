"""pytest's side of `bench.gpu.tests`: a share of the tests, a line when each starts and ends.

In the environment: REAP_SHARE "part/parts", REAP_RESULTS the file that lines go to. Tests with a
line there, of a process before that died, are not run again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

# What says that the CUDA context is gone, and with it every later test of this process.
BROKEN = ("CUDA error", "AcceleratorError", "cudaError", "device-side assert")
EXIT_BROKEN = 70


def _write(**line: Any) -> None:
    with open(os.environ["REAP_RESULTS"], "a") as file:
        file.write(json.dumps(line) + "\n")


def _seen() -> set[str]:
    path = Path(os.environ["REAP_RESULTS"])
    lines = path.read_text().splitlines() if path.exists() else []
    return {found["test"] for found in map(json.loads, lines) if "test" in found}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, parts = map(int, os.environ["REAP_SHARE"].split("/"))
    marked = [item for item in items if item.get_closest_marker("gpu") is not None]
    seen = _seen()
    kept = [item for item in marked[part::parts] if item.nodeid not in seen]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _write(test=report.nodeid, outcome="error", seconds=0, message=report.longreprtext[-1500:])


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(started=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.passed:
        return
    outcome = report.outcome if report.when == "call" or report.skipped else "error"
    text = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else report.longreprtext
    message = "" if report.passed else text[-1500:]
    _write(test=report.nodeid, outcome=outcome, seconds=round(report.duration, 2), message=message)
    if report.failed and any(word in text for word in BROKEN):
        os._exit(EXIT_BROKEN)  # whoever started this starts it again, for the tests that are left
