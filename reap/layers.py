"""One observed layer: how its experts are measured, and hooks for modules off the interface."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from reap import measure
from reap.errors import ReapError
from reap.info import LayerInfo
from reap.measure import Measured
from reap.models import Experts, router_of
from reap.modulelist import Listed


class Observer(Protocol):
    """What the layers of one observed model share."""

    options: dict[str, Any]  # backend and deterministic, for moe_saliency

    def record(self, layer: str, ids: Tensor, gates: Tensor, measured: Measured) -> None:
        """Add one call of `layer` to the statistics."""

    def verdict(self, key: Any, decide: Callable[[], str | None]) -> str | None:
        """`decide()`, once per key."""

    def say_once(self, message: str) -> None:
        """A line in the log, unless it is there already."""


class Layer:
    """The experts of one layer, while they are observed. `own` is the forward that they had."""

    def __init__(
        self,
        experts: Experts,
        info: LayerInfo,
        observer: Observer,
        own: Callable[..., Tensor],
    ) -> None:
        self.experts, self.info, self.observer, self.own = experts, info, observer, own
        self.cls = type(experts.module).__name__
        self.activation = None
        if experts.kind == "interface":
            self.activation = measure.activation_of(experts.module)

    def forward(self, hidden: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        """In place of the forward of a module on the interface: [T,H], [T,K], [T,K] -> [T,H]."""
        self.check_call(hidden, ids, gates)
        if torch.is_grad_enabled() and any(
            p.requires_grad for p in self.experts.module.parameters()
        ):
            self.observer.say_once(
                "observed experts carry no gradient: call the model under torch.no_grad()"
            )
        with torch.no_grad():
            reason = self.why_beside(hidden, ids, gates)
            if reason is None:
                options = {**self.observer.options, "activation": self.activation}
                measured = measure.fused(self.experts.module, hidden, ids, gates, **options)
            else:
                measured = self.beside(hidden, ids, gates, reason)
            self.observer.record(self.info.name, ids, gates, measured)
        return measured.out

    def why_beside(self, hidden: Tensor, ids: Tensor, gates: Tensor) -> str | None:
        """Why the module's own forward must run, None when `moe_saliency` replaces it."""
        module = self.experts.module
        reason = measure.why_not_fused(module, hidden.dtype)
        if reason is None and self.activation is None:
            reason = "its activation is of no known kind"
        if reason is not None or len(ids) == 0:
            return reason
        options = {**self.observer.options, "activation": self.activation}

        def compare() -> str | None:
            if measure.accurate(module, self.own, hidden, ids, gates, **options):
                return None
            return "its own forward computes something else, or more accurately"

        key = (type(module), self.activation, hidden.dtype, hidden.device.type)
        return self.observer.verdict(key, compare)

    def beside(
        self, hidden: Tensor, ids: Tensor, gates: Tensor, reason: str, out: Tensor | None = None
    ) -> Measured:
        """The module's own output and the norms of its slots, one at a time."""
        self.observer.say_once(
            f"{self.cls} runs as it is and once more per slot for its statistics: {reason}"
        )
        try:
            return measure.beside(self.own, hidden, ids, gates, self.info.num_experts, out)
        except ReapError as error:
            raise self.unobservable(str(error)) from error

    def check_call(self, hidden: Tensor, ids: Tensor, gates: Tensor) -> None:
        """ReapError for a call that cannot be measured, or is not with [T,K] ids and gates."""
        self.check_device(hidden.device.type)
        whole = not ids.is_floating_point() and ids.dtype != torch.bool
        if ids.dim() != 2 or ids.shape != gates.shape or not whole:
            raise self.unobservable(
                f"it is called with ids {list(ids.shape)} and gates {list(gates.shape)}, which are "
                "not [tokens, experts per token]"
            )

    def check_device(self, kind: str) -> None:
        """ReapError for a call on the meta device or under autocast."""
        if kind == "meta":
            raise self.unobservable("it is on the meta device: load the model's weights")
        if torch.is_autocast_enabled(kind):
            raise ReapError(
                f"{self.cls} ({self.info.name}) was called under autocast: load the model in the "
                "dtype that it shall run in, and leave autocast out"
            )

    def unobservable(self, reason: str) -> ReapError:
        return ReapError(f"{self.cls} ({self.info.name}) cannot be observed: {reason}")


def install_hooks(layer: Layer, undo: ExitStack) -> None:
    """Hooks, removed by `undo`, that measure a module that is not on the interface."""
    if layer.experts.kind == "direct":
        _hook_direct(layer, undo)
    elif layer.experts.kind == "input_scaled":
        _hook_input_scaled(layer, undo)
    else:
        Listed(layer).install(undo)


def _hook_direct(layer: Layer, undo: ExitStack) -> None:
    """A module whose forward takes hidden states, ids and gates: called again, slot by slot."""
    module = layer.experts.module
    signature = inspect.signature(module.forward)

    @torch.no_grad()
    def hook(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        hidden, ids, gates = list(signature.bind(*args, **kwargs).arguments.values())[:3]
        layer.check_call(hidden, ids, gates)
        reason = "it is not on transformers' experts interface"
        measured = layer.beside(hidden, ids, gates, reason, output)
        layer.observer.record(layer.info.name, ids, gates, measured)

    undo.callback(module.register_forward_hook(hook, with_kwargs=True).remove)


def _hook_input_scaled(layer: Layer, undo: ExitStack) -> None:
    """Llama 4: every expert sees every token, times a gate that is 0 where it was not chosen.

    What reaches the layer's output is f(g x). It counts as gate g and norm ||f(g x)|| / g, so that
    gate times norm is the size of the contribution, which is what the saliency measures.
    """
    router = router_of(layer.experts.block)
    if router is None:
        raise layer.unobservable("its block has no router")
    now = threading.local()

    def after_router(_: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        now.scores = output[0]

    @torch.no_grad()
    def after_experts(_: nn.Module, args: Any, output: Tensor) -> None:
        scores = now.scores  # [T,E]
        gates, ids = scores.topk(layer.info.top_k, dim=1)
        layer.check_call(args[0], ids, gates)
        y = output.view(scores.shape[1], scores.shape[0], -1)  # [E,T,H]: the model's own
        wide = torch.promote_types(y.dtype, torch.float32)
        norms = torch.linalg.vector_norm(y, dim=2, dtype=wide).T.gather(1, ids)
        peaks = y.abs().amax(dim=2).T.gather(1, ids)
        wide_gates = gates.to(wide)
        measured = Measured(output, (norms / wide_gates).float(), (peaks / wide_gates).float())
        layer.observer.record(layer.info.name, ids, gates, measured)

    undo.callback(router.register_forward_hook(after_router).remove)
    undo.callback(layer.experts.module.register_forward_hook(after_experts).remove)
