"""Which tokens of an experts call are padding, from the `attention_mask` of the model's call.

Experts see tokens flattened batch-major. That a mask lines up with them is proven from the shapes
of one and the same call, never from an equal length: the model and every model inside it down to
the experts must have been called with [B,q] tokens, the experts with B*q, and the mask must be
[B,p+q] where p tokens are in the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reap.errors import ReapError


@dataclass
class _Call:
    """One running call of a model: what it was given."""

    model: nn.Module
    shape: tuple[int, int] | None  # [B,q] of its tokens
    cached: int | None  # tokens in the cache before the call; None: it cannot be told
    mask: Any
    maskless: bool  # no argument of it is a mask of any name
    decodes: bool  # other tokens than those of the calls around it
    real: Tensor | None = None  # [B*q] bool, once worked out; None if nothing is known to be padded
    known: bool = False

    @property
    def cls(self) -> str:
        return type(self.model).__name__


class Padding:
    """Follows the calls of a model and of the models in it, while its hooks are installed.

    Every context (`contextvars`), which a thread or a suspended batch is, has calls of its own;
    tuples, because a context may begin as a copy of another.
    """

    def __init__(self) -> None:
        self._now: ContextVar[tuple[_Call, ...]] = ContextVar("calls", default=())

    @property
    def shape(self) -> tuple[int, int] | None:
        """[B,q] of the tokens that the innermost running model was called with, if known."""
        calls = self._now.get()
        return calls[-1].shape if calls else None

    def install(self, models: Iterable[nn.Module], undo: ExitStack) -> None:
        """Hooks that `undo` removes. `models` are those that contain the experts."""
        for model in models:
            enter = model.register_forward_pre_hook(self._entering(model), with_kwargs=True)
            undo.callback(enter.remove)
            # A function, which copies of the model can have: they cannot have what is a context's.
            leave = model.register_forward_hook(lambda *_: self._leave(), always_call=True)
            undo.callback(leave.remove)

    def _entering(self, model: nn.Module) -> Callable[..., None]:
        named = naming(model)

        @torch.compiler.disable
        def enter(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = named(args, kwargs)
            decodes = not _TOKENS & given.keys() and "decoder_input_ids" in given
            if decodes:
                given = _decoders(given)
            calls = self._now.get()
            if any(call.model is model for call in calls):
                # No model runs inside itself: that call was cut short, by an interrupt say.
                calls = ()
            call = _Call(
                model=model,
                shape=token_shape(given),
                cached=_cached(given),
                mask=given.get("attention_mask"),
                maskless=not any("mask" in name and x is not None for name, x in given.items()),
                decodes=decodes,
            )
            self._now.set((*calls, call))

        return enter

    @torch.compiler.disable
    def _leave(self) -> None:
        self._now.set(self._now.get()[:-1])

    def real(self, tokens: int, device: torch.device) -> Tensor | None:
        """Which of the `tokens` that experts were just called with are not padding: [T] bool.

        None when all are, or when the model was called without a mask; on a GPU, where asking would
        wait for it, perhaps a mask of all. ReapError when there is padding and it cannot be lined
        up with the tokens.
        """
        calls = self._now.get()
        calls = calls[max((i for i, call in enumerate(calls) if call.decodes), default=0) :]
        masked = next((i for i, call in enumerate(calls) if call.mask is not None), None)
        if masked is None:
            return None
        call, outer = calls[masked], calls[:masked]
        if not call.known:
            if outer and not _is_plain(call.mask) and all(around.maskless for around in outer):
                call.real = None  # made by the model itself, which was told of no padding
            else:
                call.real = _real(call)
            call.known = True
        if call.real is None:
            return None
        misfit = _misfit(calls[masked:], tokens)
        if misfit is not None:
            if bool(call.real.all()):
                return None
            raise ReapError(f"cannot tell padding: {misfit}: use batches without padding")
        call.real = call.real.to(device)
        return call.real


def _misfit(calls: tuple[_Call, ...], tokens: int) -> str | None:
    """Why the first of `calls`, which has a mask, is not of the same tokens as the experts'."""
    call = calls[0]
    for inner in calls:
        if inner.shape != call.shape:
            seen = "no token ids" if inner.shape is None else f"tokens {list(inner.shape)}"
            return (
                f"{call.cls} was called with tokens {list(call.shape or ())} and {inner.cls} "
                f"in it with {seen}"
            )
    known = 0 if call.real is None else len(call.real)
    if known != tokens:
        return f"{call.cls} was called with {known} tokens and its experts with {tokens}"
    return None


def _decoders(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of a call with a decoder's tokens alone (a canvas beside the prompt, say) what is of them."""
    own = {name.removeprefix("decoder_"): x for name, x in given.items() if "decoder_" in name}
    return {name: x for name, x in given.items() if "mask" not in name} | own


def naming(model: nn.Module) -> Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]:
    """What gives a call's arguments their names. They are not bound to the signature, which lacks
    the old names that a decorator still takes."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return lambda args, kwargs: {**dict(zip(names, args, strict=False)), **kwargs}


_TOKENS = {"input_ids", "inputs_embeds"}


def token_shape(given: Mapping[str, Any]) -> tuple[int, int] | None:
    """[B,q] of the tokens of a call."""
    for name in ("input_ids", "inputs_embeds"):
        tokens = given.get(name)
        if isinstance(tokens, Tensor) and tokens.dim() >= 2:
            return int(tokens.shape[0]), int(tokens.shape[1])
    return None


def _cached(given: Mapping[str, Any]) -> int | None:
    """Tokens in the cache that a call is given; None: it cannot be told, the mask alone judges.

    A cache is told by what it is: what the argument is called differs between releases and models.
    """
    caches = [x for x in given.values() if callable(getattr(x, "get_seq_length", None))]
    if not caches:  # a cache of a kind that we do not know, if any
        return None if any(map(_may_be_cache, given, given.values())) else 0
    try:
        lengths = {int(cache.get_seq_length()) for cache in caches}
    except Exception:  # one that has no single length
        return None
    return lengths.pop() if len(lengths) == 1 else None


def _may_be_cache(name: str, value: Any) -> bool:
    """By its name; a flag (`use_cache`) or a tensor of positions holds no tokens."""
    return ("past" in name or "cache" in name) and not isinstance(value, bool | Tensor | None)


def _is_plain(mask: Any) -> bool:
    """[batch, length], of numbers that say which tokens are padding."""
    return isinstance(mask, Tensor) and mask.dim() == 2


def _pads_nothing(call: _Call) -> bool:
    """Whether a prepared mask, or one of several by kind of layer, proves it: the last token may
    attend to every token of the call."""
    if call.shape is None or call.cached is None:
        return False
    batch, length = call.shape
    masks = call.mask.values() if isinstance(call.mask, Mapping) else [call.mask]
    for mask in masks:
        if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[2] != length:
            continue
        seen = mask[
            :, :, -1, call.cached : call.cached + length
        ]  # bool, or what is added to scores
        if seen.shape[-1] == length and bool(
            (seen if seen.dtype == torch.bool else seen == 0).all()
        ):
            return True
    return False


def _real(call: _Call) -> Tensor | None:
    """[B*q] bool, or None where nothing is padded."""
    mask = call.mask
    if not _is_plain(mask):
        if _pads_nothing(call):
            return None
        what = f"has shape {list(mask.shape)}" if isinstance(mask, Tensor) else "is prepared"
        raise ReapError(
            f"cannot tell padding: the attention_mask of {call.cls} {what}: call it with a mask "
            "[batch, length], 1 for a token and 0 for padding (`generate`: without a static cache)"
        )
    misfit, cached = _lined_up(call, mask)
    if misfit is not None:
        if bool(mask.all()):
            return None
        raise ReapError(f"cannot tell padding: {misfit}: use batches without padding")
    real = (mask[:, cached:] != 0).flatten()
    # Elsewhere than on a CPU the answer would make the host wait for all work before it.
    return None if real.device.type == "cpu" and bool(real.all()) else real


def _lined_up(call: _Call, mask: Tensor) -> tuple[str | None, int]:
    """Why the mask is not of the call's tokens, and how many tokens are in the cache."""
    if call.shape is None:
        return (
            f"{call.cls} was called with an attention_mask {list(mask.shape)} but without input_ids"
        ), 0
    batch, length = call.shape
    cached = mask.shape[1] - length if call.cached is None else call.cached
    if mask.shape[0] != batch or mask.shape[1] != cached + length or cached < 0:
        return (
            f"{call.cls} was called with tokens [{batch}, {length}] after {cached} in the cache, "
            f"and an attention_mask {list(mask.shape)}"
        ), 0
    return None, cached
