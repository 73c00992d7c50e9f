"""Raw results: one JSON file per experiment, a cell per model and seed, resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.setting import Setting
from reap.errors import ReapError
from reap.files.atomic import write_file


class Store:
    """The cells of an experiment that were measured in one setting."""

    def __init__(self, folder: Path, name: str, setting: Setting) -> None:
        self.path = folder / f"{name}.json"
        self.setting = setting.to_json()
        self.cells: dict[str, Any] = {}
        if self.path.exists():
            found = load(self.path)
            if found["setting"] != self.setting:
                raise ReapError(
                    f"{self.path} was measured in another setting or on other weights: --fresh "
                    "measures again"
                )
            self.cells = found["cells"]

    def add(self, key: str, cell: Any) -> None:
        self.cells[key] = rounded(cell)
        write_file(self.path, encoded(self.setting, self.cells), overwrite=True)


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def encoded(setting: dict[str, Any], cells: dict[str, Any]) -> bytes:
    """A line per cell."""
    lines = [f"  {json.dumps(key)}: {json.dumps(cells[key])}" for key in sorted(cells)]
    body = ",\n".join(lines)
    return f'{{"setting": {json.dumps(setting)},\n "cells": {{\n{body}\n}}}}\n'.encode()


def rounded(value: Any) -> Any:
    """Six digits: what the last ones would say differs between processors."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return value
