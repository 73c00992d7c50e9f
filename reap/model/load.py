"""From a folder to a model and tokenizer in memory, with every cheap check first."""

from __future__ import annotations

import copy
import os
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from reap.errors import ReapError, first_line
from reap.files.folder import Folder, open_folder
from reap.files.paths import path_of
from reap.files.safefile import check_is_here
from reap.model import compat
from reap.model.config import (
    config_for,
    is_uneven,
    model_classes,
    not_run,
    read_config,
    text_config,
)
from reap.model.experts import pretrained
from reap.model.mtp import UnsupportedMtpError, find_mtp
from reap.model.mtplayer import (
    Mtp,
    configuration,
    device_of,
    embedding_names,
    mtp_on_meta,
    stack_of,
)
from reap.model.quiet import quiet
from reap.model.shapes import loading_problems, mtp_problems
from reap.model.stored import DTYPES as STORED
from reap.model.stored import Stored
from reap.model.uneven import counts_of
from reap.model.unevenmodel import classes_for
from reap.model.unpacked import Unpacked, mark, open_stored, unpacked_entries

DTYPES = ("auto", "bfloat16", "float16", "float32")
# Ordinary text: of this any tokenizer makes several different tokens.
_ORDINARY = "def f(x): return 10\nThe ACGT of genes; la vie, жизнь, 生命."
ACCELERATED = ("balanced", "balanced_low_0", "sequential")  # over devices: by accelerate alone


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer; ReapError when it has none that loads, or only as code that may not
    be run."""
    from transformers import AutoTokenizer

    given = {}
    if is_uneven(folder):  # of the model type in the file transformers knows nothing
        given["config"] = read_config(folder, trust_remote_code=trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, **given
        )
    except Exception as error:
        denied = not_run(folder, "tokenizer", error)
        if denied:
            raise denied from error
        for path in sorted(folder.glob("*token*")):
            check_is_here(path)  # a better reason
        raise ReapError(f"{folder} has no tokenizer that loads: {first_line(error)}") from error
    check_tokenizer(tokenizer, str(folder))
    return tokenizer


def check_tokenizer(tokenizer: Any, name: str = "") -> None:
    """ReapError for one that makes nothing of ordinary text, or one token again and again. Of a
    folder without tokenizer files transformers makes such a one, and says nothing."""
    ids = list(tokenizer(_ORDINARY, add_special_tokens=False)["input_ids"])
    if len({*ids} - special_ids(tokenizer)) < 2:
        whose = name or getattr(tokenizer, "name_or_path", "") or "this model"
        raise ReapError(
            f"{whose} has no tokenizer: the {type(tokenizer).__name__} that transformers loads "
            "makes no tokens of ordinary text: add the model's tokenizer files"
        )


def special_ids(tokenizer: Any) -> set[int]:
    """Tokens that stand for no text: of a sequence's ends, padding and so on, and the unknown."""
    return {*(getattr(tokenizer, "all_special_ids", None) or ())}


def check_dtype(dtype: str) -> None:
    """ReapError for one that `load_model` does not know."""
    if dtype not in DTYPES:
        raise ReapError(f"dtype is {dtype!r}: it must be one of {', '.join(DTYPES)}")


def find_device(device: str) -> str:
    """What `load_model` makes of its `device`: "auto" is the first GPU, else the CPU. ReapError for
    one that this machine has not."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ACCELERATED:
        try:
            torch.empty(0, device=device)
        except Exception as error:
            raise ReapError(f"device {device!r} is not usable: {first_line(error)}") from error
    return device


def load_model(
    folder: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Any:
    """A causal language model in eval mode, from safetensors files that were checked first.

    dtype: "auto" (as stored), "bfloat16", "float16" or "float32". device: "auto" (the first GPU,
    else the CPU), or what torch or accelerate call it ("cpu", "cuda:1", "balanced").
    Python code that the folder brings is run with `trust_remote_code` alone.
    A folder whose layers have different numbers of experts, as `prune` writes it by a plan of
    scope "global", is loaded by this alone.
    Raises ReapError for damaged or missing weight files, and for weights that the model needs and
    the files do not have.
    """
    folder = Path(path_of(folder, "folder", "the folder of a model"))
    device = find_device(device)
    # Without accelerate a model can still be loaded whole and then moved.
    moved = find_spec("accelerate") is None and device not in ACCELERATED
    place = None if moved or device == "cpu" else device
    model = from_folder(folder, dtype, trust_remote_code, nullcontext(), device_map=place)
    if moved:
        try:
            model.to(device)
        except torch.OutOfMemoryError as error:
            raise _too_large(folder, device, error) from error
    return model


def from_folder(
    folder: Path,
    dtype: str,
    trust_remote_code: bool,
    around: AbstractContextManager[Any],
    device_map: str | None = None,
    stored: Stored | None = None,
) -> Any:
    """What `load_model` does once the device is known. The loading itself is inside of `around`;
    `stored` are the folder's tensors, if they are at hand."""
    check_dtype(dtype)
    compat.require(compat.LOADING)
    opened = open_folder(folder)  # reads headers alone
    stored = stored or open_stored(opened)
    unpacked = stored if isinstance(stored, Unpacked) else None
    if unpacked is not None:
        compat.require(compat.UNPACKING)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    own = getattr(config, "auto_map", None) or {} if trust_remote_code else {}
    autos = (
        auto
        for auto in compat.auto_classes()
        if auto.__name__ in own or compat.mapped_class(auto, config)
    )
    cls = next(autos, None) or model_classes(config, folder)[0]
    given = {"dtype": dtype} if unpacked is None else _unquantised(config, unpacked, dtype)
    if counts_of(config):  # its layers have different numbers of experts
        cls = classes_for(config, folder)[0]
        given["config"] = config_for(cls, given.get("config", config))
    try:
        state = (
            nullcontext() if unpacked is None else compat.loading(unpacked.state(), unpacked.settle)
        )
        with quiet(bars=sys.stderr.isatty()), around, state:
            model, report = cls.from_pretrained(
                folder,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                device_map=device_map,
                **given,
            )
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _too_large(folder, device_map or "cpu", error) from error
    except ReapError:
        raise
    except Exception as error:
        if unpacked is not None and unpacked.failed is not None:
            raise ReapError(f"{folder} does not load: {unpacked.failed}") from error
        raise ReapError(f"{folder} does not load: {_why(opened, error)}") from error
    places = getattr(model, "hf_device_map", None) or {}
    if unpacked is not None and "disk" in places.values():  # it would be read there as it is packed
        raise ReapError(
            f"{folder} is quantised, and does not fit in the memory of {device_map}: what is left "
            "over on disk would be read without being dequantised: calibrate it with --stream "
            "--device cpu"
        )
    if report["missing_keys"]:
        raise ReapError(
            f"{folder} does not hold this model: {len(report['missing_keys'])} weights are "
            f"missing, such as {min(report['missing_keys'])}"
        )
    mark(model, stored)
    return model.eval()


def _unquantised(config: Any, stored: Unpacked, dtype: str) -> dict[str, Any]:
    """For `from_pretrained`: the configuration, as if the checkpoint had been saved unquantised."""
    plain = copy.deepcopy(config)
    for part in (plain, text_config(plain)):
        for name in ("quantization_config", "compression_config"):
            vars(part).pop(name, None)
    if dtype == "auto":
        of_model = getattr(plain, "dtype", None) or getattr(text_config(plain), "dtype", None)
        entries = stored.entries()
        kinds = Counter(entries[name][0] for name in stored.packing.plain)
        floats = (STORED[kind] for kind, _ in kinds.most_common() if kind in ("BF16", "F16", "F32"))
        dtype = of_model or next(floats, torch.bfloat16)
    return {"config": plain, "dtype": dtype}


def _too_large(folder: Path, device: str, error: BaseException) -> ReapError:
    return ReapError(f"{folder} does not fit in the memory of {device}: {first_line(error)}")


def load_mtp(model: Any, folder: str | os.PathLike[str] | None = None) -> Mtp | None:
    """The multi-token-prediction layer that the folder of `model` holds, for `observe` and
    `calibrate`; None where it has none with experts.

    It is in the model's dtype, and where its last hidden states are. `folder` is needed where the
    model does not know a local folder that it came from. UnsupportedMtpError, a ReapError, for a
    layer that is not known, or is not whole.
    """
    known = compat.source(pretrained(model).config)
    if folder is None and not os.path.isdir(known):
        raise ReapError(
            f"{known or type(model).__name__} is no folder here, in which a multi-token-prediction "
            "layer could be: say the folder of the model's files"
        )
    opened = open_folder(folder or known)
    stored = open_stored(opened)
    names = stored.entries() if isinstance(stored, Unpacked) else _shapes(opened)
    place = find_mtp(pretrained(model).config, names)
    if place is None:
        return None
    stack = stack_of(model)
    device = device_of(stack)
    moved = find_spec("accelerate") is None or device.type == "cpu"
    try:
        with quiet(bars=sys.stderr.isatty()):
            blocks, report = type(stack).from_pretrained(
                None,
                config=configuration(place, stack.config),
                state_dict=_read(stored, place.inside),
                dtype=stack.dtype,
                device_map=None if moved else device,
                output_loading_info=True,
            )
        mtp = Mtp(place, blocks.to(device) if moved else blocks)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ReapError(
            f"{place.root} does not fit in the memory of {device}: {first_line(error)}: leave "
            "multi-token prediction out (mtp=False, --no-mtp)"
        ) from error
    except Exception as error:  # whatever the class or the loader makes of these tensors
        raise UnsupportedMtpError(
            _why_no_mtp(model, opened, f"{place.root}: {first_line(error)}")
        ) from error
    wrong = report["missing_keys"] - embedding_names(blocks) | report["unexpected_keys"]
    wrong |= mtp.take(_read(stored, place.beside))
    if wrong:
        raise UnsupportedMtpError(
            f"{place.root} is not what {type(stack).__name__} has layers of: {min(wrong)} is "
            "missing, or is not known"
        )
    return mtp.eval()


def _read(stored: Stored, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The tensors with these names in the folder, under others."""
    return {names[name]: tensor[...] for name, tensor in stored.read(names).items()}


def _shapes(folder: Folder) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (t.dtype, t.shape) for s in folder.shards for name, t in s.tensors.items()}


def _why_no_mtp(model: Any, folder: Folder, reason: str) -> str:
    """What is wrong with the weights, which transformers prints as a table, or else the reason."""
    tensors = unpacked_entries(folder.config, _shapes(folder), folder.path)
    try:
        mtp = mtp_on_meta(model, tensors)
        problems = mtp_problems(mtp, tensors) if mtp is not None else set()
    except (NotImplementedError, UnsupportedMtpError):
        problems = set()
    return min(problems, default=reason)


def _why(folder: Folder, error: Exception) -> str:
    """What is wrong: with the weights, which transformers prints as a table, or else."""
    try:
        problems = loading_problems(folder.config, _shapes(folder), folder.path)
    except NotImplementedError:
        problems = set()
    return min((p for p in problems if "not part of" not in p), default=first_line(error))
