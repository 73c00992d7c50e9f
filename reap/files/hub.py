"""From what the user typed to a folder on disk: a path as it is, or a hub id through its cache."""

from __future__ import annotations

import re
from pathlib import Path

from reap.errors import ReapError, first_line
from reap.files.folder import OTHER_FOLDERS

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# What a repository holds beside the model that is read here: the weights in other formats or of
# other programs, copies of them in folders, and what training leaves.
NOT_USED = [
    *("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.h5"),
    *("*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.tflite", "*.mlmodel", "*.npz", "*.pkl"),
    *("*.tar", "*.tar.gz", "*.zip", "*.nemo", "*.parquet", "*.mp4", "*.png", "*.jpg", "*.gif"),
    *("consolidated*", "tf_model*", "flax_model*", "rust_model*"),
    *(f"{folder}/*" for folder in sorted(OTHER_FOLDERS)),
    *("openvino/*", "gguf/*", "coreml/*", "mlx/*", "checkpoint-*/*", "global_step*/*"),
]


def resolve_model(model: str | Path, revision: str | None = None) -> Path:
    """The local folder of `model`: a folder as it is, or a hub id through the hub's cache, of
    which only what is used here is downloaded. `revision`: a branch, tag or commit of the hub's.

    Raises ReapError when it is neither, or when the hub cannot be reached.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ReapError(f"{folder} is not a model folder: it has no config.json")
        if revision is not None:
            raise ReapError(f"{folder} is a folder here: a revision is of a hub id")
        return folder
    if folder.exists():
        raise ReapError(f"{folder} is a file: give the model's folder")
    if not HUB_ID.fullmatch(str(model)):
        raise ReapError(f"{model} does not exist: give a model folder or a hub id such as org/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), revision=revision, ignore_patterns=NOT_USED))
    except Exception as error:
        which = f"{model} at {revision}" if revision else model
        parent = folder.parent  # the first part of a hub id, or a folder here
        beside = f" ({parent} has {_listed(parent)})" if parent.is_dir() else ""
        raise ReapError(
            f"{which} is no local folder{beside} and the hub did not give it: {first_line(error)}"
        ) from error


def _listed(folder: Path) -> str:
    """The folders in `folder`, a few of them."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    return ", ".join([*names[:4], *(["..."] if len(names) > 4 else [])]) or "no folders"
