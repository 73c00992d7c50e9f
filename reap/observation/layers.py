"""One observed layer, and how its experts are measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from reap.errors import ReapError
from reap.model import compat
from reap.model.experts import Experts
from reap.model.info import LayerInfo
from reap.observation import measure
from reap.observation.measure import Measured
from reap.observation.phantoms import Mark


class Slots(NamedTuple):
    """The slots of one call of a layer, as they are counted."""

    ids: Tensor  # [T,K], those of no choice of the router beyond the experts
    gates: Tensor  # [T,K]
    real: Tensor | None  # tokens that are no padding [T] bool; None: all
    weights: Tensor | None  # in sums over slots [2,T,K] fp32; None: no sums are wanted


class Observer(Protocol):
    """What the layers of one observed model share."""

    options: dict[str, Any]  # backend and deterministic, for moe_saliency

    outputs: bool  # whether sums over slots are wanted

    def slots(self, layer: Layer, ids: Tensor, gates: Tensor) -> Slots:
        """Which slots of the call that `layer` is in count, once per call."""

    def record(self, layer: Layer, slots: Slots, measured: Measured) -> None:
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
            self.layout = compat.layout(experts.module)
            self.names = measure.weight_names(self.layout)
            self.activation = observer.verdict(
                measure.state_of(experts.module, self.names),
                lambda: measure.activation_of(experts.module),
            )
        self.options = {**observer.options, "activation": self.activation}
        self.mark: Mark = lambda ids: ids  # see `phantoms`
        # Of the router's last call, of so many tokens [T,E]; see `logits`
        self.logits: Callable[[int], Tensor | None] = lambda tokens: None
        self.replaced: Callable[[], bool] = lambda: False  # parts of it that no hook sees

    def forward(self, hidden: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        """In place of the forward of a module on the interface: [T,H], [T,K], [T,K] -> [T,H]."""
        self.check_call(hidden, ids, gates)
        module = self.experts.module
        if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
            self.observer.say_once(
                "observed experts carry no gradient: call the model under torch.no_grad()"
            )
        with torch.no_grad():
            # Read at every call: offloading swaps them.
            weights = [getattr(module, name, None) for name in self.names]
            reason = self.why_not_fused(weights, hidden, ids, gates)
            slots = self.observer.slots(self, ids, gates)
            given = hidden, ids, gates
            if reason is None:
                measured = measure.fused(
                    weights, self.layout, *given, slots.weights, **self.options
                )
            else:
                measured = self.slot_by_slot(*given, reason, slots.weights)
            self.observer.record(self, slots, measured)
        return measured.out

    def why_not_fused(
        self, weights: list[Any], hidden: Tensor, ids: Tensor, gates: Tensor
    ) -> str | None:
        """Why the module's own forward must run, None when `moe_saliency` replaces it."""
        reason = measure.why_not_fused(self.names, weights, self.layout, hidden.dtype)
        if reason is None and self.activation is None:
            reason = "its activation is of no known kind"
        if reason is not None or len(ids) == 0:
            return reason

        def compare() -> str | None:
            probe = (weights, self.layout, self.own, hidden, ids, gates)
            if measure.accurate(*probe, **self.options):
                return None
            return "its own forward computes something else, or more accurately"

        key = (type(self.experts.module), self.activation, hidden.dtype, hidden.device.type)
        return self.observer.verdict(key, compare)

    def slot_by_slot(
        self,
        hidden: Tensor,
        ids: Tensor,
        gates: Tensor,
        reason: str,
        sum_weights: Tensor | None,
        out: Tensor | None = None,
    ) -> Measured:
        """The module's own output, and norms by extra forwards of one slot per token."""
        self.observer.say_once(
            f"{self.cls} runs as it is, with {ids.shape[1]} extra forwards for its statistics: "
            f"{reason}"
        )
        try:
            experts = self.info.num_experts
            return measure.slot_by_slot(self.own, hidden, ids, gates, experts, out, sum_weights)
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
        """ReapError for a call on the meta device, under autocast or into a CUDA graph."""
        if kind == "meta":
            raise self.unobservable("it is on the meta device: load the model's weights")
        if torch.is_autocast_enabled(kind):
            raise ReapError(
                f"{self.cls} ({self.info.name}) was called under autocast: load the model in the "
                "dtype that it shall run in, and leave autocast out"
            )
        if kind == "cuda" and torch.cuda.is_current_stream_capturing():
            raise self.unobservable(
                "a CUDA graph is being captured, and its replays would run without what counts on "
                "the host: call the model without graphs"
            )

    def unobservable(self, reason: str) -> ReapError:
        return ReapError(f"{self.cls} ({self.info.name}) cannot be observed: {reason}")
