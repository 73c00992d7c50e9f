"""A model folder on disk: config, safetensors shards with their index, and other files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap.errors import ReapError
from reap.files.garbage import uncollected
from reap.files.safefile import Header, check_is_here, read_header, read_json

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Other copies of the weights, which would keep the experts that are removed, and what version
# control and download tools leave: not part of a pruned model.
OTHER_WEIGHTS = re.compile(
    r"pytorch_model.*\.bin(\.index\.json)?|.*\.safetensors(\.index\.json)?|.*\.gguf|consolidated\..*"
    r"|tf_model.*|flax_model.*|.*\.onnx(_data)?|model.*\.index\.json"
)
_SHARD = re.compile(r"[^/\\\0.][^/\\\0]*\.safetensors")
OTHER_FOLDERS = {".git", ".cache", "__pycache__", "original", "metal", "onnx"}


@dataclass(frozen=True)
class Folder:
    """A checked folder. `shards` are in file name order; `index`, None for a single file, lacks its
    weight_map: `placed` has those tensors of a shard, by name, that it places in another."""

    path: Path
    config: dict[str, Any]
    shards: tuple[Header, ...]
    index: dict[str, Any] | None
    placed: Mapping[str, str]
    others: tuple[str, ...]  # files to carry over, relative
    left_out: tuple[str, ...]
    homes: tuple[Path, ...]  # where its files may lie: here, and where config and weights link to

    def read_from(self, name: str) -> Path:
        """Where `name` may be read: links are followed, but not out of the folder's homes."""
        return _at_home(self.path, name, self.homes)


def open_folder(path: str | os.PathLike[str]) -> Folder:
    """Reads config, index and headers, nothing else. ReapError says what is wrong."""
    try:
        return _open(path)
    except OSError as error:
        raise ReapError(f"cannot read {error.filename or path}: {error.strerror}") from error


@uncollected()
def _open(path: str | os.PathLike[str]) -> Folder:
    root = Path(os.path.realpath(path))
    if not root.is_dir():
        raise ReapError(
            f"{path} is not a folder: give the folder of a model (config.json and *.safetensors)"
        )
    if not (root / CONFIG).exists():
        raise ReapError(f"{path} is not a model folder: it has no {CONFIG}")
    config = read_json(root / CONFIG, limit=16 << 20)
    index = read_json(root / INDEX) if os.path.lexists(root / INDEX) else None
    shards, placed = _shards(root, index)
    own = {CONFIG, INDEX, *(shard.path.name for shard in shards)}
    # The hub's cache and farms of links keep a model's files elsewhere. What is checked to be
    # configuration or weights says where; any other link may lead to what is nobody's business.
    homes = dict.fromkeys([root, *(Path(os.path.realpath(root / name)).parent for name in own)])
    others, left_out = _other_files(root, own, tuple(homes))
    return Folder(root, config, shards, index, placed, others, left_out, tuple(homes))


def _at_home(root: Path, name: str, homes: tuple[Path, ...]) -> Path:
    """`root/name`; ReapError when it links to a file outside of `homes`."""
    path = root / name
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(home) for home in homes):
        raise ReapError(
            f"{path} links to {real}, away from the model's files: put the file itself there"
        )
    return path


def _shards(
    root: Path, index: dict[str, Any] | None
) -> tuple[tuple[Header, ...], Mapping[str, str]]:
    """The shards, and which of their tensors the index places in another; takes its weight_map."""
    single = os.path.lexists(root / SINGLE)
    if index is None:
        if not single:
            _no_weights(root)
        return (read_header(root / SINGLE),), {}
    weight_map = index.pop("weight_map", None)
    if not isinstance(weight_map, dict) or not weight_map:
        raise ReapError(f"{root / INDEX} has no weight_map")
    if not isinstance(index.get("metadata") or {}, dict):
        raise ReapError(f"{root / INDEX}: its metadata must be a JSON object")
    by_shard: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise ReapError(
                f"{root / INDEX} places {name!r} in {shard!r}: not the name of a file in the folder"
            )
        by_shard.setdefault(shard, []).append(name)
    if single and SINGLE not in by_shard:
        raise ReapError(
            f"{root} has both {SINGLE} and an index that does not name it: remove one of them"
        )
    shards: list[Header] = []
    placed: dict[str, str] = {}
    for shard, names in sorted(by_shard.items()):
        if not os.path.lexists(root / shard):
            raise ReapError(
                f"{root / INDEX} names {shard}, which is not there: download it or mend the index"
            )
        header = read_header(root / shard)
        missing = next((name for name in names if name not in header.tensors), None)
        if missing is not None:
            raise ReapError(f"{shard} does not hold {missing!r}, although the index says so")
        if len(names) < len(header.tensors):
            homes = {name: weight_map.get(name, shard) for name in header.tensors}
            placed |= {name: home for name, home in homes.items() if home != shard}
        shards.append(header)
    return tuple(shards), placed


def _no_weights(root: Path) -> None:
    found = sorted(
        p.name for p in root.iterdir() if re.search(r"\.(bin|safetensors|gguf|pt|pth)$", p.name)
    )
    if not found:
        raise ReapError(f"{root} is not a model folder: it has no {SINGLE} and no {INDEX}")
    if all(name.endswith(".safetensors") for name in found):
        raise ReapError(
            f"{root} has {found[0]} but neither {SINGLE} nor {INDEX}: the index is missing"
        )
    raise ReapError(
        f"{root} has no safetensors weights, only {found[0]}: convert it to safetensors first"
    )


def _other_files(
    root: Path, done: set[str], homes: tuple[Path, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    def unreadable(error: OSError) -> None:
        raise error

    keep, leave = [], []
    for parent, folders, files in os.walk(root, onerror=unreadable):
        above = Path(parent).relative_to(root)
        for folder in sorted(folders):
            if folder in OTHER_FOLDERS or Path(parent, folder).is_symlink():
                folders.remove(folder)
                leave.append(f"{above / folder}{os.sep}")
        for file in sorted(files):
            name = str(above / file)
            if name in done:
                continue
            if above == Path(".") and OTHER_WEIGHTS.fullmatch(file):
                leave.append(name)
            elif not _at_home(root, name, homes).is_file():
                raise ReapError(
                    f"{root / name} is not a regular file, or a link to one that is not there"
                )
            else:
                check_is_here(root / name)
                keep.append(name)
    return tuple(sorted(keep)), tuple(sorted(leave))
