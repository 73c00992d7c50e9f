"""One observed layer: how its experts are measured, and hooks for modules off the interface."""

from __future__ import annotations

import inspect
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
        """ReapError for a call that is not [T,K] ids and gates, or is made under autocast."""
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            raise ReapError(
                f"{self.cls} ({self.info.name}) was called under autocast: load the model in the "
                "dtype that it shall run in, and leave autocast out"
            )
        whole = not ids.is_floating_point() and ids.dtype != torch.bool
        if ids.dim() != 2 or ids.shape != gates.shape or not whole:
            raise self.unobservable(
                f"it is called with ids {list(ids.shape)} and gates {list(gates.shape)}, which are "
                "not [tokens, experts per token]"
            )

    def unobservable(self, reason: str) -> ReapError:
        return ReapError(f"{self.cls} ({self.info.name}) cannot be observed: {reason}")


def install_hooks(layer: Layer, undo: ExitStack) -> None:
    """Hooks, removed by `undo`, that measure a module that is not on the interface."""
    {"direct": _hook_direct, "input_scaled": _hook_input_scaled, "list": _hook_list}[
        layer.experts.kind
    ](layer, undo)


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
    chosen: list[Tensor] = []

    def after_router(_: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        chosen[:] = [output[0]]

    @torch.no_grad()
    def after_experts(_: nn.Module, args: Any, output: Tensor) -> None:
        scores = chosen.pop()  # [T,E]
        gates, ids = scores.topk(layer.info.top_k, dim=1)
        layer.check_call(args[0], ids, gates)
        y = output.view(scores.shape[1], scores.shape[0], -1)  # [E,T,H]: the model's own
        norms = torch.linalg.vector_norm(y, dim=2, dtype=torch.float32).T.gather(1, ids)
        peaks = y.abs().amax(dim=2).T.float().gather(1, ids)
        measured = Measured(output, norms / gates.float(), peaks / gates.float())
        layer.observer.record(layer.info.name, ids, gates, measured)

    undo.callback(router.register_forward_hook(after_router).remove)
    undo.callback(layer.experts.module.register_forward_hook(after_experts).remove)


def _hook_list(layer: Layer, undo: ExitStack) -> None:
    """A ModuleList of experts beside a router that returns ids and gates (remote code)."""
    router, block = router_of(layer.experts.block), layer.experts.block
    if router is None:
        raise layer.unobservable("its block has no router")
    routed: list[tuple[Tensor, Tensor]] = []

    def after_router(_: nn.Module, args: Any, output: Any) -> None:
        routed[:] = [_ids_and_gates(layer, output)]

    @torch.no_grad()
    def after_block(_: nn.Module, args: Any, output: Any) -> None:
        ids, gates = routed.pop()
        out = output[0] if isinstance(output, tuple) else output
        x = args[0].reshape(-1, args[0].shape[-1])  # [T,H]
        layer.check_call(x, ids, gates)
        norms = torch.zeros(ids.shape, dtype=torch.float32, device=x.device)
        peaks, total = torch.zeros_like(norms), torch.zeros_like(x, dtype=torch.float32)
        for expert in ids.unique().tolist():
            token, slot = torch.nonzero(ids == expert, as_tuple=True)
            y = layer.experts.module[expert](x[token]).float()
            norms[token, slot] = torch.linalg.vector_norm(y, dim=1)
            peaks[token, slot] = y.abs().amax(dim=1)
            total.index_add_(0, token, gates[token, slot, None].float() * y)
        for name in ("shared_experts", "shared_expert"):
            if isinstance(getattr(block, name, None), nn.Module):
                total += getattr(block, name)(x).float()
        try:
            measure.check_sum(total, out.reshape(total.shape))
        except ReapError as error:
            raise layer.unobservable(str(error)) from error
        layer.observer.record(layer.info.name, ids, gates, Measured(out, norms, peaks))

    undo.callback(router.register_forward_hook(after_router).remove)
    undo.callback(block.register_forward_hook(after_block).remove)


def _ids_and_gates(layer: Layer, output: Any) -> tuple[Tensor, Tensor]:
    """The expert ids [T,K] and gates [T,K] in what a router returned."""
    parts = (
        [part for part in output if isinstance(part, Tensor)] if isinstance(output, tuple) else []
    )
    for ids in parts:
        if ids.is_floating_point() or ids.shape[-1:] != (layer.info.top_k,):
            continue
        for gates in parts:
            if gates.is_floating_point() and gates.shape == ids.shape:
                return ids.reshape(-1, ids.shape[-1]), gates.reshape(-1, ids.shape[-1])
    raise layer.unobservable("its router does not return expert ids and gates")
