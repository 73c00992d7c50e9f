"""What callers give where a path belongs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from reap.errors import ReapError


def path_of(given: Any, name: str, wanted: str) -> Path:
    """The path in argument `name`; ReapError, which says what is `wanted`, for anything else."""
    if isinstance(given, str | os.PathLike) and isinstance(os.fspath(given), str):
        return Path(given)
    raise ReapError(f"{name} is a {type(given).__name__}: it must be {wanted}")
