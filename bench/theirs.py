"""Other programs that compute REAP, each in its own environment, on the same model and rows."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.measure import Settings
from bench.row import Row

SCRIPTS = Path(__file__).parent


@dataclass(frozen=True)
class Result:
    """Milliseconds per run: its whole observation, and a plain forward in the same process."""

    ms: dict[str, list[float]]
    versions: dict[str, str]

    def stamp(self, row: Row) -> Row:
        """The row with the versions of what really ran."""
        return replace(row, versions=self.versions) if row.impl in self.ms else row


def run(
    settings: Settings, config: dict[str, Any], dtype: str, length: int, rows: int
) -> list[Result]:
    """Of those that run here; why another does not is said."""
    job = {"config": config, "dtype": dtype, "length": length, "rows": rows}
    job["threads"] = torch.get_num_threads()
    found = []
    if settings.llmcompressor is None:
        settings.say("calibrate: skips llm-compressor, no --llmcompressor-python was given")
    else:
        found.append(_child("llm-compressor", settings.llmcompressor, job, settings))
    if settings.official is None:
        settings.say("calibrate: skips the official observer, no --official-repository was given")
    else:
        job["sources"] = str(settings.official / "src")
        python = settings.official / ".venv" / "bin" / "python"
        found.append(_child("official", python, job, settings))
    return [result for result in found if result is not None]


def _child(name: str, python: Path, job: dict[str, Any], settings: Settings) -> Result | None:
    script = SCRIPTS / f"{name.replace('-', '')}_child.py"
    # Isolated: this folder must not shadow modules of that environment.
    command = [str(python), "-I", str(script), json.dumps(job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        settings.say(f"calibrate: skips {name}, {error}")
        return None
    lines = done.stderr.strip().splitlines()
    if done.returncode:
        settings.say(f"calibrate: skips {name}, {lines[-1] if lines else done.returncode}")
        return None
    found = json.loads(done.stdout.splitlines()[-1])
    return Result(found["ms"], found["versions"])
