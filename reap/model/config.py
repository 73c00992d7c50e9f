"""A model's configuration: read from its folder, and what in it speaks of experts."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from reap.errors import ReapError, first_line
from reap.files.safefile import check_is_here, read_json
from reap.model import compat
from reap.model.uneven import counts_in, restored

# Keys, most specific first; a composite model has them in its `text_config`.
EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = (
    *("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k"),
    "moe_top_k",
)
USUAL_LENGTH = 2048  # tokens of a row of the paper's calibration text


class NeedsCodeError(ReapError):
    """A folder that only Python code of its own explains, which nobody has allowed to run."""


def not_run(folder: Path, what: str, error: Exception) -> NeedsCodeError | None:
    """The error of a folder whose `what` is code that transformers was not allowed to run."""
    if "trust_remote_code" not in str(error):
        return None
    return NeedsCodeError(
        f"{folder} needs Python code of its own for its {what}, which is not run: read it, then "
        "allow it with trust_remote_code=True"
    )


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the language model."""
    get = getattr(config, "get_text_config", None)
    return get() if callable(get) else config


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The configuration of the model in `folder`; ReapError when it has none that can be used.

    NeedsCodeError when it is code in the folder that has it, and that may not be run.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ReapError(f"{folder} is not a model folder: it has no config.json")
    check_is_here(folder / "config.json")
    # transformers says less of broken or bottomless JSON
    written = read_json(folder / "config.json")
    uneven = bool(counts_in(written))
    try:
        with TemporaryDirectory() if uneven else nullcontext(folder) as place:
            if uneven:
                Path(place, "config.json").write_text(json.dumps(restored(written)))
            # Always said: where it is not, transformers asks on the terminal and reads stdin.
            config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
        if uneven:
            compat.set_source(config, folder)
        return config
    except Exception as error:
        denied = not_run(folder, "configuration", error)
        if denied:
            raise denied from error
        raise ReapError(f"{folder}/config.json is not usable: {first_line(error)}") from error


def is_uneven(folder: Path) -> bool:
    """Whether its config.json, if it has one, is of layers with different numbers of experts."""
    path = folder / "config.json"
    return path.is_file() and bool(counts_in(read_json(path)))


def row_length(folder: Path, asked: int | None, *, trust_remote_code: bool = False) -> int:
    """Tokens per row: what was asked for, else 2,048 or the model's limit where that is lower.

    Raises ReapError for more than the model has positions.
    """
    config = text_config(read_config(folder, trust_remote_code=trust_remote_code))
    limit = getattr(config, "max_position_embeddings", None)
    if asked and limit and asked > limit:
        raise ReapError(f"rows of {asked} tokens are too long: {folder} has {limit} positions")
    return asked or min(USUAL_LENGTH, limit or USUAL_LENGTH)


def model_classes(config: Any, folder: Path) -> list[Any]:
    """The classes that may load this configuration, the one that loads text models first.

    ReapError, which names the folder it is from, when there is none.
    """
    import transformers

    mapped = [compat.mapped_class(auto, config) for auto in compat.auto_classes()]
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    classes = list(dict.fromkeys(cls for cls in (*mapped, *named) if isinstance(cls, type)))
    if not classes:
        raise ReapError(f"{folder}: transformers has no language model of type {config.model_type}")
    return classes


def config_for(cls: Any, config: Any) -> Any:
    """A copy of the part of a composite configuration that `cls` is built from."""
    composite = isinstance(config, cls.config_class) or cls.config_class is None
    return copy.deepcopy(config if composite else text_config(config))


def check_has_experts(config: Any, name: str) -> None:
    """ReapError for a dense model."""
    text = text_config(config)
    if not any(_positive(getattr(text, key, None)) for key in EXPERT_COUNT_KEYS) and not any(
        _positive(getattr(getattr(text, "ffn_config", None), key, None))
        for key in EXPERT_COUNT_KEYS
    ):
        raise ReapError(
            f"{name} is a {config.model_type} model without mixture-of-experts layers: there is "
            "nothing to observe or prune"
        )


def _positive(count: Any) -> bool:
    """Of a number of experts, or one number per layer."""
    return max(count, default=0) > 0 if isinstance(count, list | tuple) else bool(count)
