"""What a file is, for messages to people who gave one where another belongs."""

from __future__ import annotations

from pathlib import Path

from reap.errors import ReapError
from reap.files.outputs import KINDS, REPORT, TRACE, format_of, is_report
from reap.files.safefile import LFS_POINTER, open_regular, read_header, read_json


def kind_of(path: Path) -> str | None:
    """A phrase such as "a plan"; None for what is not known or cannot be read."""
    if path.is_dir():
        return "a folder"
    try:
        with open(open_regular(path), "rb") as file:
            head = file.read(256)
        if head.startswith(LFS_POINTER):
            return None  # whoever reads it says so
        if is_report(head):
            return KINDS[REPORT]
        if head.lstrip().startswith(b"{"):
            fields = read_json(path)
            known = KINDS.get(str(fields.get("format")))
            return known or ("a model's config" if "model_type" in fields else None)
        metadata = read_header(path).metadata
    except (ReapError, OSError):
        return None
    if "reap" not in metadata:
        return "weights of a model"
    return KINDS[TRACE] if format_of(path) == TRACE else "statistics"
