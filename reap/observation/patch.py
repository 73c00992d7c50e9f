"""Observing a model: statistics of every expert while any forward loop runs.

transformers looks up the forward of an experts module in a registry, by a name in the module's
configuration. `observe` registers one function, sets the name, and puts everything back.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import reap_kernels
from reap.errors import ReapError
from reap.model import compat
from reap.model.experts import Experts, find_experts, router_of
from reap.model.identity import describe
from reap.model.mtplayer import Mtp
from reap.observation.following import follow
from reap.observation.hooks import install_hooks
from reap.observation.layers import Layer, Slots
from reap.observation.logits import watch_logits
from reap.observation.measure import Measured
from reap.observation.modulelist import KeptExperts
from reap.observation.padding import Padding
from reap.observation.phantoms import watch
from reap.observation.witness import Witness
from reap.statistics.stats import Statistics
from reap.statistics.trace import Trace

log = logging.getLogger("reap")

NAME = "reap"  # of the function in transformers' registry


@dataclass
class _Patch:
    """A configuration whose experts implementation was replaced, by `users` observed modules."""

    config: Any
    before: Any
    users: int = 0


_lock = threading.Lock()  # two threads may observe two models
_layers: weakref.WeakKeyDictionary[nn.Module, Layer] = weakref.WeakKeyDictionary()
_patches: dict[int, _Patch] = {}  # by id of the configuration, which models may share


@contextmanager
def observe(
    model: nn.Module,
    *,
    gates: str = "applied",
    pairs: bool = False,
    outputs: bool = False,
    coalitions: int = 0,
    logits: bool = False,
    trace: Trace | None = None,
    backend: str = "auto",
    deterministic: bool = False,
    mtp: Mtp | None = None,
) -> Iterator[Statistics]:
    """Collect the statistics of every expert of `model` while it is called inside the `with`.

        with reap.observe(model) as stats:
            for batch in batches:
                model(**batch)

    gates: "applied" (the weight that the model multiplies with) or "renormalized" (divided by the
    token's sum). pairs: also statistics of pairs of experts, [E,E] per layer. outputs: also sums of
    whole vectors per expert, from which mean outputs follow: of outputs [E,H], and of the inner
    activation [E,I] where experts run on `moe_saliency` (others hide it). coalitions: also which
    sets of experts tokens chose, at most so many per layer and domain. logits: also the sums of
    products of the router's logits [E,E], where it shows them; the log says where not.
    trace: also what each of the first tokens chose, in a file of its own. backend and
    deterministic go to `reap_kernels.moe_saliency`. `with stats.domain("code"):` separates domains,
    and in `with stats.counting(mask):` only some tokens of the calls count.
    mtp: a multi-token-prediction layer of the model, from `load_mtp`, which then runs after every
    forward, on what that computed, and is observed too.

    Outputs equal the unobserved model's up to rounding. They carry no gradient: this is inference.
    Padding, read from the 2-D `attention_mask` of the call, is not counted. Experts that
    `moe_saliency` cannot stand in for run as before, with K extra forwards for their statistics (in
    a ModuleList a few); the log says so once. The model is put back exactly, also after an
    exception; a compiled model runs uncompiled inside the `with`. Layers recomputed by gradient
    checkpointing count once. A slot that the router chose counts, whatever its gate is rounded to.

    What changes a model comes first: quantise, linearise or wrap it, then observe what came out,
    then run it. With a program that does all this by itself (llm-compressor's `oneshot`) begin to
    observe after it has changed the model, and let it call every layer once: a sequential pipeline
    runs each layer twice on the same tokens, which count twice, as the log says where it shows.

    On a GPU no layer makes the host wait: bad ids and numbers are noted there and reported at the
    end. The first call of each kind of experts waits once, to compare `moe_saliency` with their own
    forward. A CUDA graph cannot hold an observed layer: the host keeps the domain, tells padding,
    creates sums where it first needs them and carries between their limbs, none of which a replay
    would repeat. Coalitions make it wait once in 65,536 tokens of a layer, logits once per kind of
    router, a trace at every layer until it is full.

    ReapError, before any forward: no transformers model, no MoE layers, experts that cannot be
    observed, a model that is being observed, an unknown or unavailable backend. ReapError, in a
    forward: autocast, no weights (the meta device), the capture of a CUDA graph, padding that
    cannot be lined up with the experts' tokens, a NaN or infinite norm (on a GPU this one comes at
    the end). ReapError at the end, unless another error is under way: a layer that was replaced in
    the `with` (its module, its forward or its block's), so that it ran without being counted, and a
    model that ran without any of its layers. A layer that was merely never called is a warning.
    """
    check_backend(backend)
    if not isinstance(mtp, Mtp | None):
        raise ReapError(
            f"mtp is a {type(mtp).__name__}: it must be what reap.load_mtp(model) gives"
        )
    compat.require(compat.OBSERVING)
    found = find_experts(model)
    for experts in found:
        _check_whole(experts)
    stats = Statistics(
        describe(model, found, mtp),
        gates=gates,
        pairs=pairs,
        outputs=outputs,
        coalitions=coalitions,
        logits=logits,
    )
    options = {"backend": backend, "deterministic": deterministic}
    observations = [_Observation(stats, options, trace)]
    with ExitStack() as undo:
        if trace is not None:
            trace.begin(stats.model, gates)
            undo.callback(trace.close)
        observations[0].install(model, found, undo)
        if mtp is not None:  # apart, since its calls are of other tokens
            observations.append(_Observation(stats, options, trace))
            observations[1].install(mtp.stack, mtp.experts, undo)
            follow(model, mtp, stats, undo)
        yield stats
        stats.check()
        observations[0].witness.check(model)
        if mtp is not None:
            observations[1].witness.check(mtp.stack)
        if trace is not None:
            trace.save()


class _Observation:
    """What the layers of one observed model share."""

    def __init__(
        self, stats: Statistics, options: dict[str, Any], trace: Trace | None = None
    ) -> None:
        self.stats = stats
        self.trace = trace
        self.options = options
        self.outputs = stats.outputs
        self.padding = Padding()
        self.witness = Witness()
        self._recording = threading.Lock()  # threads may call one model
        self._verdicts: dict[Any, str | None] = {}
        self._said: set[str] = set()

    def install(self, model: nn.Module, found: list[Experts], undo: ExitStack) -> None:
        if compat.is_compiled(model) or any(experts.kind != "interface" for experts in found):
            undo.enter_context(uncompiled())
        layers = []
        with _lock:
            for experts in found:
                if experts.module in _layers:
                    raise ReapError(
                        f"layer {experts.name} is being observed already: end that observe first"
                    )
            for experts in found:
                undo.callback(_layers.pop, experts.module, None)
                layer = Layer(
                    experts, self.stats.model.layer(experts.name), self, _own_forward(experts)
                )
                _layers[experts.module] = layer
                layers.append(layer)
                layer.mark = watch(router_of(experts.block), layer.info.num_experts, undo)
                if self.stats.logits:
                    layer.logits = watch_logits(layer, undo)
                if experts.kind == "interface":
                    _patch(experts.module.config, undo)
                else:
                    install_hooks(layer, undo)
        holders = holders_of(model, found)
        self.padding.install(holders, undo)
        self.witness.install(layers, holders, undo)

    def slots(self, layer: Layer, ids: Tensor, gates: Tensor) -> Slots:
        if compat.in_backward():  # recomputed, and counted before
            return Slots(ids, gates, None, None)
        real = self.padding.real(len(ids), ids.device)
        self.stats.check_counted(self.padding.shape)
        ids = layer.mark(ids)
        return Slots(ids, gates, real, self.stats.slot_weights(layer.info.name, ids, gates, real))

    def record(self, layer: Layer, slots: Slots, measured: Measured) -> None:
        if compat.in_backward():
            return
        logits = layer.logits(len(slots.ids)) if self.stats.logits else None
        with self._recording:
            self.witness.record(layer, slots.ids, slots.gates)
            if self.trace is not None:
                ids, real = slots.ids, slots.real
                counted = self.stats.counted_of(len(ids), ids.device, real)
                columns = ids, slots.gates, measured.norms
                self.trace.add(layer.info.name, *columns, counted, self.padding.shape)
            self.stats.update(
                layer.info.name,
                *(slots.ids, slots.gates, measured.norms, measured.peaks, slots.real),
                output_sums=measured.output_sums,
                channel_sums=measured.channel_sums,
                logits=logits,
            )

    def verdict(self, key: Any, decide: Callable[[], str | None]) -> str | None:
        if key not in self._verdicts:
            self._verdicts[key] = decide()
        return self._verdicts[key]

    def say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            log.warning(message)


@torch.compiler.disable
def _observed_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The function in transformers' registry."""
    layer = _layers.get(self)
    if layer is not None:
        return layer.forward(hidden_states, top_k_index, top_k_weights)
    # Not observed, but of a model that shares its configuration with one that is.
    patch = _patches.get(id(self.config))
    if patch is None:
        raise ReapError(
            f"{type(self).__name__} is in a copy of a model that was made while it was observed: "
            "copy the model before or after"
        )
    own = compat.experts_forward(self, patch.before)
    return own(hidden_states, top_k_index, top_k_weights)


def _own_forward(experts: Experts) -> Callable[..., Tensor]:
    """The forward that the module has without us, bound; resolved at every call."""
    module = experts.module

    def own(*args: Tensor) -> Tensor:
        return compat.experts_forward(module, _patches[id(module.config)].before)(*args)

    def direct(hidden: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        if ids.shape[1] == 1:  # some modules squeeze it away: a second slot with gate zero
            ids, gates = ids.expand(-1, 2), torch.cat([gates, torch.zeros_like(gates)], 1)
        return module.forward(hidden, ids, gates)

    return own if experts.kind == "interface" else direct


def _patch(config: Any, undo: ExitStack) -> None:
    """Make `config` ask for our function, until the last of its users is undone."""
    key = compat.EXPERTS_KEY
    patch = _patches.setdefault(id(config), _Patch(config, vars(config).get(key)))
    undo.callback(_unpatch, patch)
    patch.users += 1
    compat.experts_functions()[NAME] = _observed_forward
    vars(config)[key] = NAME


def _unpatch(patch: _Patch) -> None:
    with _lock:
        patch.users -= 1
        if patch.users > 0:
            return
        vars(patch.config)[compat.EXPERTS_KEY] = patch.before
        del _patches[id(patch.config)]
        if not _patches:
            del compat.experts_functions()[NAME]


_eager: list[Any] = []  # the compiler's stance, once for every `with` that needs it


@contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled models run as they are written: compiled code misses hooks that came after it."""
    with _lock:
        # Threads may leave in any order: the first to enter sets the stance, the last resets it.
        _eager.append(_eager[0] if _eager else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _lock:
            stance = _eager.pop()
            if not _eager:
                stance.__exit__(None, None, None)


def holders_of(model: nn.Module, found: list[Experts]) -> list[nn.Module]:
    """The transformers models in `model` that contain observed experts, outermost first."""
    from transformers import PreTrainedModel

    observed = {id(experts.module) for experts in found}
    return [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
        and any(id(child) in observed for child in module.modules())
    ]


def check_backend(backend: str) -> None:
    """ReapError for a backend that is unknown, or not available on this machine."""
    known = reap_kernels.backends()
    if backend != "auto" and backend not in known:
        raise ReapError(f"backend is {backend!r}: it must be auto or one of {', '.join(known)}")
    if backend != "auto" and known[backend]:
        raise ReapError(f"backend {backend} is not available here: {known[backend]}")


def _check_whole(experts: Experts) -> None:
    """ReapError for experts of which not all are here."""
    if isinstance(experts.module, KeptExperts):
        raise ReapError(
            f"layer {experts.name} is masked, and a list of experts does not tell which of them "
            "are left: observe the model first, and mask it inside"
        )
    if compat.is_split(experts.module):
        raise ReapError(
            f"{type(experts.module).__name__} ({experts.name}) is split over processes: load the "
            "model without tensor or expert parallelism and give each process its share of the data"
        )
