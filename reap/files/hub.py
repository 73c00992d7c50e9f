"""From what the user typed to a folder on disk: a path as it is, or a hub id through its cache."""

from __future__ import annotations

import re
from pathlib import Path

from reap.errors import ReapError, first_line

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Formats of a hub model's weights that nothing here reads.
OTHER_FORMATS = ["*.bin", "*.pt", "*.pth", "*.gguf"]


def resolve_model(model: str | Path) -> Path:
    """The local folder of `model`: a folder as it is, or a hub id through the hub's cache.

    Raises ReapError when it is neither, or when the hub cannot be reached.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ReapError(f"{folder} is not a model folder: it has no config.json")
        return folder
    if folder.exists():
        raise ReapError(f"{folder} is a file: give the model's folder")
    if not HUB_ID.fullmatch(str(model)):
        raise ReapError(f"{model} does not exist: give a model folder or a hub id such as org/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), ignore_patterns=OTHER_FORMATS))
    except Exception as error:
        parent = folder.parent  # the first part of a hub id, or a folder here
        beside = f" ({parent} has {_listed(parent)})" if parent.is_dir() else ""
        raise ReapError(
            f"{model} is no local folder{beside} and the hub did not give it: {first_line(error)}"
        ) from error


def _listed(folder: Path) -> str:
    """The folders in `folder`, a few of them."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    return ", ".join([*names[:4], *(["..."] if len(names) > 4 else [])]) or "no folders"
