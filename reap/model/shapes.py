"""Would transformers load these tensors? Asked with its own loader on the meta device: no data."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import nn

from reap.errors import first_line
from reap.files.garbage import uncollected
from reap.model import compat
from reap.model.mtp import UnsupportedMtpError
from reap.model.mtplayer import Mtp, embedding_names, mtp_on_meta
from reap.model.quiet import quiet
from reap.model.uneven import counts_of, restored
from reap.model.unevenmodel import uneven_class
from reap.model.unpacked import unpacked_entries

_LAYER = re.compile(r"(\D*?\.)(\d+)(\..*)")  # what a layer's list is called, its number, its own
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> dtype as safetensors calls it, shape


@uncollected()
def loading_problems(
    fields: Mapping[str, Any], tensors: Tensors, files: Path | None = None
) -> set[str]:
    """One line for each parameter missing, unexpected or of the wrong shape; `fields`: config.json,
    which a quantiser's file in the folder `files` may complete.

    Weights of a format that is read here count as what they are once decoded. A checkpoint may have
    harmless ones (scales that only a quantiser would take, layers for other runtimes), so what
    counts is that pruning adds none. NotImplementedError, with the reason, when transformers cannot
    build the model without custom code.
    """
    from transformers import AutoConfig

    with TemporaryDirectory() as folder:
        # From a file, because that decodes what from_dict does not.
        Path(folder, "config.json").write_text(json.dumps(restored(fields)))
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            with torch.device("meta"):
                model = uneven_class(_model_class(config), counts_of(config))(config)
        except Exception as error:  # whatever a config from anywhere makes a model class raise
            raise NotImplementedError(_reason(error)) from error
    tensors = unpacked_entries(fields, tensors, files)
    state = _empty(tensors)
    try:
        mtp = mtp_on_meta(model, tensors)
    except UnsupportedMtpError:
        mtp = None  # not part of the model
    of_mtp = mtp_problems(mtp, tensors) if mtp is not None else set()
    for name in mtp.place.tensors if mtp is not None else ():
        del state[name]
    repeated = _repeated(model, state)
    if repeated:
        some = {name: like for name, like in state.items() if not repeated(name)}
        found = _loaded(copy.deepcopy(model), some)
        found = found._replace(missing={name for name in found.missing if not repeated(name)})
        if not any(found):  # what is wrong is said of each layer that has it
            return of_mtp
    return _said(_loaded(model, state)) | of_mtp


class _Repeated(NamedTuple):
    """Whether a name is of a layer that is like one before it. None is where `layers` is empty."""

    layers: frozenset[str]  # their numbers

    def __call__(self, name: str) -> bool:
        found = _LAYER.match(name)
        return found is not None and found[2] in self.layers

    def __bool__(self) -> bool:
        return bool(self.layers)


def _repeated(model: nn.Module, state: Mapping[str, torch.Tensor]) -> _Repeated:
    """Of 61 layers most have the same names, data types and shapes, in the file as in the model,
    and the loader, which takes its time for every tensor, says the same of them."""
    layers: dict[str, tuple[int, int]] = {}  # of all that it has, how much that is and a hash
    held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for whose, tensors in (("file", state), ("model", held)):
        for name, tensor in tensors.items():
            if found := _LAYER.match(name):
                kind = hash((whose, found[1], found[3], tensor.dtype, tensor.shape))
                count, total = layers.get(found[2], (0, 0))
                layers[found[2]] = count + 1, (total + kind) & (1 << 64) - 1  # in any order
    first: dict[tuple[int, int], str] = {}
    for number, own in layers.items():
        first.setdefault(own, number)
    return _Repeated(frozenset(layers) - frozenset(first.values()))


def mtp_problems(mtp: Mtp, tensors: Tensors) -> set[str]:
    """The same for the tensors of a multi-token-prediction layer on the meta device."""
    place = mtp.place
    own = {n: p.shape for n, p in mtp.named_parameters() if not n.startswith("stack.")}
    problems = {f"{place.root} has no {n}" for n in own.keys() - set(place.beside.values())}
    for name, new in place.beside.items():
        dtype, shape = tensors[name]
        if own.get(new) != shape or not _dtype(dtype).is_floating_point:
            problems.add(f"{name} is {dtype} {list(shape)}")
    state = _empty({new: tensors[name] for name, new in place.inside.items()})
    found = _loaded(mtp.stack, state)
    found = found._replace(missing=found.missing - embedding_names(mtp.stack))
    return problems | {f"{place.root}: {problem}" for problem in _said(found)}


def _loaded(model: nn.Module, state: Mapping[str, torch.Tensor]) -> compat.Loaded:
    with quiet():
        try:
            return compat.load_on_meta(model, state)
        except Exception as error:  # a format that only its quantiser can convert
            raise NotImplementedError(_reason(error)) from error


def _said(found: compat.Loaded) -> set[str]:
    return (
        {f"{name} is missing" for name in found.missing}
        | {f"{name} is not part of the model" for name in found.unexpected}
        | {f"{name} has the wrong shape" for name in found.mismatched}
        | {f"{name} cannot be converted" for name in found.unconverted}
    )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _model_class(config: Any) -> Any:
    import transformers

    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    found = compat.mapped_class(transformers.AutoModelForCausalLM, config)
    if found is None:
        raise LookupError(f"no causal language model of type {config.model_type}")
    return found


def _empty(tensors: Tensors) -> dict[str, torch.Tensor]:
    # One of each kind is enough: without data they are all alike.
    like = {
        (dtype, shape): torch.empty(shape, dtype=_dtype(dtype), device="meta")
        for dtype, shape in set(tensors.values())
    }
    return {name: like[kind] for name, kind in tensors.items()}


def _dtype(name: str) -> Any:
    """A torch dtype of the same width: the loader moves values, it never looks at them."""
    known = {
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "F32": torch.float32,
        "F64": torch.float64,
    }
    return known.get(name, torch.uint8)
