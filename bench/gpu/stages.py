"""Stages, each a program of its own with a limit: one that fails or hangs costs its own results."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TAIL = 4000  # characters of a program's output that the report keeps
OK, FAILED, TIMEOUT, SKIPPED = "ok", "failed", "timeout", "skipped"


@dataclass(frozen=True)
class Stage:
    """A program, or what makes one of the outcomes of the stages before. What it has found is in
    `result`, a file of one JSON value or of JSON lines that it writes as it goes."""

    name: str
    command: Sequence[str] | Callable[[dict[str, dict[str, Any]]], Sequence[str]]
    limit: float  # seconds
    result: Path | None = None
    needs: tuple[str, ...] = ()  # stages without whose success this one is not started
    env: dict[str, str] = field(default_factory=dict)
    beside: bool = False  # runs beside the next stage; the one after that waits for both


class Report:
    """One JSON file, written anew after every change, under another name first: always whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {"stages": {}}
        path.parent.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, outcome: dict[str, Any]) -> None:
        self.content["stages"][name] = outcome
        self.write()

    def write(self) -> None:
        new = self.path.with_suffix(f".{os.getpid()}.new")
        new.write_text(json.dumps(self.content, indent=1))
        new.replace(self.path)

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        return self.content["stages"]

    @property
    def wrong(self) -> list[str]:
        return [name for name, outcome in self.stages.items() if outcome["state"] != OK]


class _Running:
    """A stage's processes, in a session of their own, so that all of them can be ended."""

    def __init__(
        self, stage: Stage, limit: float, logs: Path, before: dict[str, dict[str, Any]]
    ) -> None:
        self.stage, self.limit = stage, limit
        self.log = logs / f"{stage.name}.log"
        self.started = time.monotonic()
        if stage.result is not None:
            stage.result.unlink(missing_ok=True)
        with open(self.log, "wb") as output:
            self.process = subprocess.Popen(
                stage.command(before) if callable(stage.command) else stage.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **stage.env},
                start_new_session=True,
            )

    def outcome(self) -> dict[str, Any]:
        """Waits for the end, which comes at the limit at the latest."""
        left = self.limit - (time.monotonic() - self.started)
        try:
            code = self.process.wait(timeout=max(0.0, left))
            state = OK if code == 0 else FAILED
        except subprocess.TimeoutExpired:
            code, state = None, TIMEOUT
        end(self.process)
        said = self.log.read_text(errors="replace")
        return {
            "state": state,
            "code": code,
            "seconds": round(time.monotonic() - self.started, 1),
            "limit": round(self.limit, 1),
            "result": read(self.stage.result),
            "tail": said[-TAIL:] if state != OK else "",
            "log": str(self.log),
        }


def end(process: subprocess.Popen[Any]) -> None:
    """Kills a program and everything that it started, and waits for it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read(path: Path | None) -> Any:
    """A file of one JSON value, or of JSON lines, of which the last may be torn: as a list."""
    if path is None or not path.exists():
        return None
    text = path.read_text(errors="replace")
    with contextlib.suppress(ValueError):
        return json.loads(text)
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def run(
    stages: Sequence[Stage],
    report: Report,
    logs: Path,
    *,
    seconds: float,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Runs the stages within so many seconds in all; the names of those that are not right."""
    logs.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    waiting: list[_Running] = []

    def finish() -> None:
        for running in waiting:
            outcome = running.outcome()
            report.put(running.stage.name, outcome)
            say(f"{running.stage.name}: {outcome['state']}, {outcome['seconds']} s")
            for line in outcome["tail"].splitlines()[-12:]:
                say(f"    {line}")
        waiting.clear()

    try:
        for stage in stages:
            ran = {**report.stages, **{running.stage.name: {"state": OK} for running in waiting}}
            lacking = [name for name in stage.needs if ran.get(name, {}).get("state") != OK]
            left = deadline - time.monotonic()
            if lacking or left < 1:
                why = f"needs {', '.join(lacking)}" if lacking else "no time is left"
                report.put(stage.name, {"state": SKIPPED, "why": why, "tail": "", "seconds": 0})
                say(f"{stage.name}: skipped, {why}")
                continue
            say(f"{stage.name}: at most {min(stage.limit, left):.0f} s")
            try:
                waiting.append(_Running(stage, min(stage.limit, left), logs, report.stages))
            except OSError as error:
                report.put(stage.name, {"state": FAILED, "tail": str(error), "seconds": 0})
                say(f"{stage.name}: failed, {error}")
                continue
            if not stage.beside:
                finish()
        finish()
    finally:
        for running in waiting:
            end(running.process)
    return report.wrong
