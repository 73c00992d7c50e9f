"""From what the user typed to a model and tokenizer in memory, with every cheap check first."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap.errors import ReapError, first_line
from reap.sources import HUB_ID

if TYPE_CHECKING:
    from reap.checkpoint.folder import Folder

DTYPES = ("auto", "bfloat16", "float16", "float32")
ACCELERATED = ("balanced", "balanced_low_0", "sequential")  # over devices: by accelerate alone
# Formats of a hub model's weights that nothing here reads.
OTHER_FORMATS = ["*.bin", "*.pt", "*.pth", "*.gguf"]
USUAL_LENGTH = 2048  # of the paper's calibration rows


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
        raise ReapError(
            f"{model} is no local folder and the hub did not give it: {first_line(error)}"
        ) from error


def row_length(folder: Path, asked: int | None) -> int:
    """Tokens per row: what was asked for, else 2,048 or the model's limit where that is lower.

    Raises ReapError for more than the model has positions.
    """
    from reap.models import read_config, text_config

    limit = getattr(text_config(read_config(folder)), "max_position_embeddings", None)
    if asked and limit and asked > limit:
        raise ReapError(f"rows of {asked} tokens are too long: {folder} has {limit} positions")
    return asked or min(USUAL_LENGTH, limit or USUAL_LENGTH)


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; ReapError when it has none that loads."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise ReapError(f"{folder} has no tokenizer that loads: {first_line(error)}") from error


def load_model(folder: Path, *, dtype: str = "auto", device: str = "auto") -> Any:
    """A causal language model in eval mode, from safetensors files that were checked first.

    dtype: "auto" (as stored), "bfloat16", "float16" or "float32". device: "auto" (the first GPU,
    else the CPU), or what torch or accelerate call it ("cpu", "cuda:1", "balanced").
    Raises ReapError for damaged or missing weight files, and for weights that the model needs and
    the files do not have.
    """
    import torch

    from reap.checkpoint.folder import open_folder
    from reap.models import auto_classes, model_classes, read_config

    if dtype not in DTYPES:
        raise ReapError(f"dtype is {dtype!r}: it must be one of {', '.join(DTYPES)}")
    opened = open_folder(folder)  # reads headers alone
    config = read_config(folder)
    autos = (auto for auto in auto_classes() if type(config) in auto._model_mapping)
    cls = next(autos, None) or model_classes(config, folder)[0]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ACCELERATED:
        try:
            torch.empty(0, device=device)
        except Exception as error:
            raise ReapError(f"device {device!r} is not usable: {first_line(error)}") from error
    # Without accelerate a model can still be loaded whole and then moved.
    moved = find_spec("accelerate") is None and device not in ACCELERATED
    try:
        with quiet(bars=sys.stderr.isatty()):
            model, report = cls.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                device_map=None if moved or device == "cpu" else device,
            )
            if moved:
                model.to(device)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ReapError(
            f"{folder} does not fit in the memory of {device}: {first_line(error)}"
        ) from error
    except Exception as error:
        raise ReapError(f"{folder} does not load: {_why(opened, error)}") from error
    if report["missing_keys"]:
        raise ReapError(
            f"{folder} does not hold this model: {len(report['missing_keys'])} weights are "
            f"missing, such as {min(report['missing_keys'])}"
        )
    return model.eval()


def _why(folder: Folder, error: Exception) -> str:
    """What is wrong: with the weights, which transformers prints as a table, or else."""
    from reap.checkpoint.shapes import loading_problems

    tensors = {name: (t.dtype, t.shape) for s in folder.shards for name, t in s.tensors.items()}
    try:
        problems = loading_problems(folder.config, tensors)
    except NotImplementedError:
        problems = set()
    return min((p for p in problems if "not part of" not in p), default=first_line(error))


@contextmanager
def quiet(*, bars: bool = False) -> Iterator[None]:
    """Without transformers' table of weights, and without its progress bars unless `bars`."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
