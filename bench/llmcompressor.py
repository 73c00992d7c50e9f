"""llm-compressor's REAP in a virtual environment of its own, on the same model and row sizes."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.measure import Settings
from bench.row import Row

SCRIPT = Path(__file__).with_name("llmcompressor_child.py")


@dataclass(frozen=True)
class Result:
    """Milliseconds per run: its whole pipeline, and a plain forward in the same process."""

    ms: dict[str, list[float]]
    versions: dict[str, str]

    def stamp(self, row: Row) -> Row:
        """The row with the versions of what really ran."""
        return replace(row, versions=self.versions) if row.impl in self.ms else row


def run(
    settings: Settings, config: dict[str, Any], dtype: str, length: int, rows: int
) -> Result | None:
    """None, with the reason said, where it does not run."""
    if settings.llmcompressor is None:
        settings.say("calibrate: skips llm-compressor, no --llmcompressor-python was given")
        return None
    job = {"config": config, "dtype": dtype, "length": length, "rows": rows}
    job["threads"] = torch.get_num_threads()
    # Isolated: this folder must not shadow modules of that environment.
    command = [str(settings.llmcompressor), "-I", str(SCRIPT), json.dumps(job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        settings.say(f"calibrate: skips llm-compressor, {error}")
        return None
    lines = done.stderr.strip().splitlines()
    if done.returncode:
        settings.say(f"calibrate: skips llm-compressor, {lines[-1] if lines else done.returncode}")
        return None
    found = json.loads(done.stdout.splitlines()[-1])
    return Result(found["ms"], found["versions"])
