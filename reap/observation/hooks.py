"""Experts that are not on transformers' interface: hooks that measure them where they are."""

from __future__ import annotations

import inspect
import threading
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from reap.model.experts import router_of
from reap.observation import measure
from reap.observation.layers import Layer
from reap.observation.measure import Measured
from reap.observation.modulelist import Listed


def install_hooks(layer: Layer, undo: ExitStack) -> None:
    """Hooks, removed by `undo`, that measure a module that is not on the interface."""
    if layer.experts.kind == "direct":
        _hook_direct(layer, undo)
    elif layer.experts.kind == "input_scaled":
        _hook_input_scaled(layer, undo)
    else:
        Listed(layer).install(undo)


def _hook_direct(layer: Layer, undo: ExitStack) -> None:
    """A module whose forward takes hidden states, ids and gates: K extra forwards."""
    module = layer.experts.module
    signature = inspect.signature(module.forward)

    @torch.no_grad()
    def hook(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        hidden, ids, gates = list(signature.bind(*args, **kwargs).arguments.values())[:3]
        layer.check_call(hidden, ids, gates)
        reason = "it is not on transformers' experts interface"
        slots = layer.observer.slots(layer, ids, gates)
        measured = layer.slot_by_slot(hidden, ids, gates, reason, slots.weights, output)
        layer.observer.record(layer, slots, measured)

    undo.callback(module.register_forward_hook(hook, with_kwargs=True).remove)


def _hook_input_scaled(layer: Layer, undo: ExitStack) -> None:
    """Llama 4: every expert sees every token, times a gate that is 0 where it was not chosen.

    What reaches the layer's output is f(g x). It counts as gate g and norm ||f(g x)|| / g, so that
    gate times norm is the size of the contribution, which is what the saliency measures. A gate
    that is rounded to 0 counts with norm 0, which is the limit.
    """
    router = router_of(layer.experts.block)
    if router is None:
        raise layer.unobservable("its block has no router")
    now = threading.local()

    def after_router(_: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        now.scores, now.logits = output[:2]

    @torch.no_grad()
    def after_experts(_: nn.Module, args: Any, output: Tensor) -> None:
        scores = now.scores  # [T,E]
        # The router's own choice: among gates that are rounded to 0, scores would not tell it.
        ids = now.logits.topk(layer.info.top_k, dim=1).indices
        gates = scores.gather(1, ids)
        layer.check_call(args[0], ids, gates)
        y = output.view(scores.shape[1], scores.shape[0], -1)  # [E,T,H]: the model's own
        wide = torch.promote_types(y.dtype, torch.float32)
        norms = torch.linalg.vector_norm(y, dim=2, dtype=wide).T.gather(1, ids)
        peaks = y.abs().amax(dim=2).T.gather(1, ids)
        divisor = torch.where(gates == 0, torch.inf, gates.to(wide))
        slots = layer.observer.slots(layer, ids, gates)
        sums = None
        if slots.weights is not None:
            sums = measure.new_sums(len(y), y[0])
            token = torch.arange(len(ids), device=ids.device)
            for k in range(ids.shape[1]):  # f(g x) / g, as in the norms
                rows = y[ids[:, k], token].to(wide) / divisor[:, k, None]
                measure.add_rows(sums, slots.ids[:, k], slots.weights[:, :, k], rows)
        measured = Measured(
            output, (norms / divisor).float(), (peaks / divisor).float(), None, sums
        )
        layer.observer.record(layer, slots, measured)

    undo.callback(router.register_forward_hook(after_router).remove)
    undo.callback(layer.experts.module.register_forward_hook(after_experts).remove)
