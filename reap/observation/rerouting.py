"""A model that runs as if some of its experts were gone; their weights stay where they are.

For that time every router is the one of the pruned checkpoint: the same module runs the same code,
on its tensors cut to the experts that are kept and with their number where it had that of all. So
top-k, gates, correction biases and groups are computed as they are after pruning, by the same
operations on the same numbers, whatever a router does. Only then are ids among the kept experts
translated to those of all. (Forbidding experts by -inf would have to know, for every router, where
its scores are, and would sum over other lengths.)
"""

from __future__ import annotations

import copy
import inspect
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reap.errors import ReapError
from reap.model import compat
from reap.model.config import EXPERT_COUNT_KEYS
from reap.model.experts import Experts, router_of
from reap.model.routers import IN_ROUTER, ROUTER, SHARED, TAILED, TOKEN_TABLE, remapped
from reap.observation.balancing import Unbalanced
from reap.observation.modulelist import KeptExperts
from reap.observation.patch import uncompiled

# Attributes of routing modules that count the experts, or these and more.
COUNTS = re.compile(r"(num|n)_((local|routed|total)_)?experts|moe_num_experts|num_router_classes")

_lock = threading.Lock()  # two threads may mask two models
_masked: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # blocks


@dataclass(frozen=True)
class _Swap:
    """An attribute of a module, and what takes its place: made when the time begins."""

    owner: nn.Module
    name: str
    make: Callable[[Any], Any]


class Rerouting:
    """The layers `found` of `model`, each routing to its experts `kept` alone: ascending ids by
    layer name.

    ReapError for a layer whose router cannot be cut to them, and for weights that are not here.
    Entering is cheap and can be repeated; a router's tensors are copied each time.
    """

    def __init__(
        self,
        model: nn.Module,
        found: list[Experts],
        kept: Mapping[str, tuple[int, ...]],
        counts: Mapping[str, int],
        model_type: str,
    ) -> None:
        self._model = model
        for experts in found:
            _check_unmasked(experts)
        self._layers = [
            _Layer(experts, counts[experts.name], kept[experts.name], model_type in TAILED)
            for experts in found
            if len(kept[experts.name]) < counts[experts.name]
        ]
        self._unbalanced = Unbalanced(model)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, the model runs so. It is put back exactly. ReapError when it runs so already."""
        with ExitStack() as undo:
            blocks = [layer.experts.block for layer in self._layers]
            with _lock:
                for layer in self._layers:
                    _check_unmasked(layer.experts)
                _masked.update(blocks)
            undo.callback(_masked.difference_update, blocks)
            if self._layers and compat.is_compiled(self._model):
                undo.enter_context(uncompiled())  # compiled code misses hooks that come after it
            if self._layers:
                self._unbalanced.enter(undo)
            for layer in self._layers:
                layer.enter(undo)
            yield


class _Layer:
    """The experts of one layer and what is exchanged around them."""

    def __init__(self, experts: Experts, total: int, kept: tuple[int, ...], tailed: bool) -> None:
        self.experts, self.total, self.kept, self.tailed = experts, total, kept, tailed
        if compat.is_split(experts.module):
            raise self._cannot("it is split over processes")
        self._extra = 0  # classes of the router beyond the experts
        self.swaps = self._tensors()
        if not self.swaps:
            raise self._cannot("its block has no router that is known")
        self.swaps += self._numbers()

    def enter(self, undo: ExitStack) -> None:
        """Make the exchanges, until `undo`."""
        for swap in self.swaps:
            was = getattr(swap.owner, swap.name)
            with torch.inference_mode(False), torch.no_grad():
                now = swap.make(was)
            undo.callback(setattr, swap.owner, swap.name, was)
            setattr(swap.owner, swap.name, now)
        module, block = self.experts.module, self.experts.block
        if self.experts.kind == "list":
            (name,) = (name for name, child in block.named_children() if child is module)
            listed: Any = module
            undo.callback(setattr, block, name, module)
            setattr(block, name, KeptExperts([listed[expert] for expert in self.kept]))
        elif self.experts.kind == "input_scaled":
            router = router_of(block)
            if router is None:
                raise self._cannot("its block has no router")
            hook = router.register_forward_hook(self._scatter(), prepend=True)
            undo.callback(hook.remove)
        else:
            translate = module.register_forward_pre_hook(self._translate(), with_kwargs=True)
            undo.callback(translate.remove)

    def _translate(self) -> Callable[..., Any]:
        """A hook before the experts: the ids [T,K] that the router gave become those of all."""
        ids = [*self.kept, *range(self.total, self.total + self._extra + 1)]
        table = torch.tensor(ids)
        name = list(inspect.signature(type(self.experts.module).forward).parameters)[2]

        def translated(given: Tensor) -> Tensor:
            nonlocal table
            if table.device != given.device:
                table = table.to(given.device)
            return table[given].to(given.dtype)

        @torch.compiler.disable
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if len(args) > 1:
                return (args[0], translated(args[1]), *args[2:]), kwargs
            return args, {**kwargs, name: translated(kwargs[name])}

        return before

    def _scatter(self) -> Callable[..., Any]:
        """A hook behind a router that returns scores and logits [T,E] of all experts."""
        places = torch.tensor(self.kept)

        @torch.compiler.disable
        def after(_: nn.Module, args: Any, output: tuple[Tensor, ...]) -> Any:
            nonlocal places
            scores, logits, *rest = output
            places = places.to(scores.device)
            shape = (*scores.shape[:-1], self.total)
            # A gate of zero lets nothing into an expert, and nothing comes out of it.
            wide = scores.new_zeros(shape).index_copy(-1, places, scores)
            low = logits.new_full(shape, -torch.inf).index_copy(-1, places, logits)
            return (wide, low, *rest)

        return after

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules of the block beside its experts, by their names in it."""
        inside = set(self.experts.module.modules())
        for tail, module in self.experts.block.named_modules():
            if module not in inside:
                yield tail, module

    def _tensors(self) -> list[_Swap]:
        swaps = []
        for tail, module in self._modules():
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, tensor in own:
                make = self._tensor(tail, name, tensor)
                if make is not None:
                    swaps.append(_Swap(module, name, make))
        return swaps

    def _tensor(self, module: str, name: str, tensor: Tensor) -> Callable[[Any], Any] | None:
        """What becomes of a tensor of a module of the block; None where it stays."""
        shape, total, tail = tensor.shape, self.total, f"{module}.{name}".lstrip(".")
        if TOKEN_TABLE.fullmatch(tail):
            return _renumbering(self.kept)
        axis = next((axis for row, axis in ROUTER if re.fullmatch(row, tail)), None)
        if axis is None:
            routes = IN_ROUTER.match(tail)
            odd = (total in shape and (routes or not module)) or (routes and tensor.numel() > 1)
            if odd and not SHARED.fullmatch(tail):
                raise self._cannot(f"it is not known what {tail} with shape {list(shape)} is")
            return None
        if tensor.is_meta:
            raise self._cannot(
                f"{tail} is not in memory (offloaded, or never loaded): load the model whole"
            )
        length = shape[axis] if axis < len(shape) else -1
        fits = length == total or (length > total and self.tailed)
        if not fits or not tensor.is_floating_point():
            raise self._cannot(
                f"{tail} is {str(tensor.dtype).removeprefix('torch.')} {list(shape)}, where axis "
                f"{axis} must have one entry for each of {total} experts"
            )
        self._extra = max(self._extra, length - total)
        rows = (*self.kept, *range(total, length))
        return partial(_selected, axis=axis, rows=rows)

    def _numbers(self) -> Iterator[_Swap]:
        """Attributes that say how many experts there are."""
        cut, fewer = {swap.owner for swap in self.swaps}, self.total - len(self.kept)
        for tail, module in self._modules():
            if tail and not IN_ROUTER.match(f"{tail}."):
                continue
            for name, value in vars(module).items():
                counts = COUNTS.fullmatch(name) or (name == "out_features" and module in cut)
                if counts and type(value) is int and value >= self.total:
                    yield _Swap(module, name, partial(_reduced, by=fewer))
            config = vars(module).get("config")
            keys = [key for key in EXPERT_COUNT_KEYS if getattr(config, key, None) == self.total]
            if tail and keys:
                yield _Swap(module, "config", partial(_with_count, keys, len(self.kept)))

    def _cannot(self, reason: str) -> ReapError:
        cls = type(self.experts.block).__name__
        return ReapError(f"{cls} ({self.experts.name}) cannot be masked: {reason}")


def _check_unmasked(experts: Experts) -> None:
    if experts.block in _masked:
        raise ReapError(f"layer {experts.name} is masked already: end that mask first")


def _selected(tensor: Tensor, *, axis: int, rows: tuple[int, ...]) -> Tensor:
    ids = torch.tensor(rows, device=tensor.device)
    chosen = tensor.detach().index_select(axis, ids)
    return nn.Parameter(chosen, False) if isinstance(tensor, nn.Parameter) else chosen


def _renumbering(kept: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """What makes a table of tokens one of the kept experts: once, since that takes seconds."""
    made: list[Tensor] = []

    def renumbered(table: Tensor) -> Tensor:
        if not made:
            made.append(torch.from_numpy(remapped(table.cpu().numpy(), kept)).to(table.device))
        return made[0]

    return renumbered


def _reduced(count: int, *, by: int) -> int:
    return count - by


def _with_count(keys: list[str], count: int, config: Any) -> Any:
    """A copy of a configuration that says so of the experts."""
    new = copy.copy(config)
    for key in keys:
        setattr(new, key, count)
    return new
