"""From what the user typed to a model and tokenizer in memory, with every cheap check first."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reap.errors import ReapError

DTYPES = ("auto", "bfloat16", "float16", "float32")
# Formats of a hub model's weights that nothing here reads.
OTHER_FORMATS = ["*.bin", "*.pt", "*.pth", "*.gguf"]
USUAL_LENGTH = 2048  # of the paper's calibration rows
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


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
            f"{model} is no local folder and the hub did not give it: {_first_line(error)}"
        ) from error


def row_length(folder: Path, asked: int | None) -> int:
    """Tokens per row: what was asked for, else 2,048 or the model's limit where that is lower.

    Raises ReapError for more than the model has positions.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise ReapError(f"{folder}/config.json is not usable: {_first_line(error)}") from error
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if asked and limit and asked > limit:
        raise ReapError(f"rows of {asked} tokens are too long: {folder} has {limit} positions")
    return asked or min(USUAL_LENGTH, limit or USUAL_LENGTH)


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; ReapError when it has none that loads."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise ReapError(f"{folder} has no tokenizer that loads: {_first_line(error)}") from error


def load_model(folder: Path, *, dtype: str = "auto", device: str = "auto") -> Any:
    """A causal language model in eval mode, from safetensors files that were checked first.

    dtype: "auto" (as stored), "bfloat16", "float16" or "float32". device: "auto" (the first GPU,
    else the CPU), or what torch or accelerate call it ("cpu", "cuda:1", "balanced").
    Raises ReapError for damaged or missing weight files, and for weights that the model needs and
    the files do not have.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    from reap.checkpoint.folder import open_folder

    if dtype not in DTYPES:
        raise ReapError(f"dtype is {dtype!r}: it must be one of {', '.join(DTYPES)}")
    open_folder(folder)  # reads headers alone
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    placement: dict[str, Any] = {} if device == "cpu" else {"device_map": device}
    known = type(AutoConfig.from_pretrained(folder)) in AutoModelForCausalLM._model_mapping
    auto = AutoModelForCausalLM if known else AutoModelForImageTextToText
    try:
        with _quiet():
            model, report = auto.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **placement
            )
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ReapError(
            f"{folder} does not fit in the memory of {device}: {_first_line(error)}"
        ) from error
    except Exception as error:
        raise ReapError(f"{folder} does not load: {_first_line(error)}") from error
    for what in ("missing_keys", "mismatched_keys"):
        if report[what]:
            example = sorted(map(str, report[what]))[0]
            raise ReapError(
                f"{folder} does not hold this model: {len(report[what])} {what.replace('_', ' ')}, "
                f"such as {example}"
            )
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars where nobody is watching."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
