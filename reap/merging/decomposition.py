"""Merging against pruning, layer by layer and pair by pair, measured on a few tokens of a text."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reap.errors import ReapError
from reap.merging.mergeplan import Group
from reap.merging.pairerrors import (
    PairErrors,
    costs_of,
    often,
    records_of,
    shared_costs,
    summary_of,
    together,
)
from reap.merging.tying import Rows, rows_of, tied
from reap.model import compat
from reap.model.experts import Experts, find_experts, layer_info, pretrained
from reap.observation import measure
from reap.observation.padding import Padding
from reap.observation.patch import holders_of
from reap.runs.calibration import eval_mode, forward_of
from reap.text.batching import Batch, batches_in

HELD = 24 << 20  # bytes of the outputs of slots, in fp64, that are held at a time, twice
CALLED = ("interface", "direct")  # kinds of experts that run a slot alone, as they are asked to


@dataclass(frozen=True)
class LayerErrors:
    """One layer: `tokens` that were looked at, and the pairs of experts that enough of them chose.

    `pairs` is empty where no pair was chosen often enough.
    """

    name: str
    tokens: int
    pairs: tuple[PairErrors, ...]

    def to_json(self) -> dict[str, Any]:
        """`summary_of` its pairs, and each of them."""
        by_pair = [pair.to_json() for pair in self.pairs]
        return {"tokens": self.tokens, **summary_of(self.pairs), "by_pair": by_pair}


def decompose(
    model: nn.Module,
    batches: Iterable[Batch | Mapping[str, Any]],
    *,
    tokens: int = 1024,
    pairs: int = 256,
    least: int = 8,
    progress: Callable[[int], None] | None = None,
) -> dict[str, LayerErrors]:
    """What merging and pruning cost for pairs of experts, per layer: formulas and measurements as
    `PairErrors` and its module have them.

    Measured on the first `tokens` tokens of `batches` that count (padding does not). Of the pairs
    that at least `least` of these tokens chose, the `pairs` most often chosen are reported. Every
    slot's expert runs alone on its token, and both experts of a reported pair on every token that
    chose either. Outputs are as the model rounds them; what is made of them is fp64.

    Beside the model this takes about 64 MiB, 72 bytes per token and pair of slots of one layer, and
    until a layer has all its tokens what went into it and came out: nothing where the first batch
    has enough, else up to 2 * `tokens` * H of the model's numbers in every layer. The run ends when
    all layers have their tokens. The model is in eval mode meanwhile and left as it was found.

    ReapError for a model without MoE layers, with routers that choose one expert per token, or with
    experts that cannot be called for one slot (Llama 4's, ModuleLists); for one that is compiled;
    and for text without a token.
    """
    for name, number in (("tokens", tokens), ("pairs", pairs), ("least", least)):
        if type(number) is not int or number < 1:
            raise ReapError(f"{name} is {number!r}: it must be a whole number of 1 or more")
    compat.require(compat.OBSERVING)
    found = find_experts(model)
    if compat.is_compiled(model):
        raise ReapError(
            "the model is compiled, so that its experts are out of reach: give it uncompiled"
        )
    config = pretrained(model).config
    limits = {"least": least, "most": pairs}
    first = {experts.name: experts for experts in reversed(found)}  # of those that are tied
    watched = {name: _Watched(first[name], config, tokens, limits) for name in reversed(first)}
    forward = forward_of(model)
    padding = Padding()
    with ExitStack() as undo, eval_mode(model), torch.inference_mode():
        padding.install(holders_of(model, found), undo)
        for experts in found:
            watched[experts.name].install(experts.module, padding, undo)
        for batch in batches_in(batches):
            for layer in watched.values():
                layer.counted = batch.counted
            forward(batch)
            if progress is not None:
                progress(batch.tokens)
            if not any(layer.left for layer in watched.values()):
                break
        found_errors = {name: layer.finished() for name, layer in watched.items()}
    if not any(layer.tokens for layer in found_errors.values()):
        raise ReapError("the text has no tokens that count: nothing was measured")
    return found_errors


class _Watched:
    """A layer while it is measured; experts that are tied share one."""

    def __init__(
        self, experts: Experts, config: Any, tokens: int, limits: Mapping[str, int]
    ) -> None:
        self.info = layer_info(experts, config)
        self.where = f"{type(experts.module).__name__} ({experts.name})"
        self.left, self.tokens, self.limits = tokens, tokens, limits
        self.counted: Tensor | None = None  # of the batch that runs
        self.forward = _alone(experts)
        try:
            self.rows: list[Rows] | None = rows_of(experts)
        except ReapError:
            self.rows = None
        self._parts: list[tuple[Tensor, ...]] = []  # hidden, ids, gates, outputs of some tokens
        self._errors: tuple[PairErrors, ...] | None = None
        if experts.kind not in CALLED:
            raise ReapError(
                f"{self.where}: its experts cannot be called for one token and expert alone, so "
                "that pairs of them cannot be measured"
            )
        if compat.is_split(experts.module):
            raise ReapError(
                f"{self.where} is split over processes: load the model without tensor or expert "
                "parallelism"
            )
        if self.info.top_k < 2:
            raise ReapError(
                f"{self.where}: its router chooses one expert per token, so that no two of them "
                "ever meet"
            )

    def install(self, module: nn.Module, padding: Padding, undo: ExitStack) -> None:
        signature = inspect.signature(module.forward)

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            if self.left:
                given = list(signature.bind(*args, **kwargs).arguments.values())[:3]
                rows = self._rows(len(given[1]), padding)
                self._parts.append(tuple(x[rows] for x in (*given, output.flatten(0, -2))))
                self.left -= len(rows)
                if not self.left:
                    self._measure()

        undo.callback(module.register_forward_hook(hook, with_kwargs=True).remove)

    def finished(self) -> LayerErrors:
        if self._errors is None:
            self._measure()
        return LayerErrors(self.info.name, self.tokens - self.left, self._errors or ())

    def _rows(self, tokens: int, padding: Padding) -> Tensor:
        """Which of the tokens of a call are taken."""
        real = padding.real(tokens, torch.device("cpu"))
        rows = torch.ones(tokens, dtype=torch.bool) if real is None else real
        if self.counted is not None:
            if self.counted.numel() != tokens:
                raise ReapError(
                    f"{self.where} was called with {tokens} tokens, and of {self.counted.numel()} "
                    "the batch says which count"
                )
            rows = rows & self.counted.flatten().cpu()
        return rows.nonzero().flatten()[: self.left]

    def _measure(self) -> None:
        parts, self._parts = self._parts, []
        if not sum(len(part[0]) for part in parts):
            return
        hidden, ids, gates, output = (torch.cat(column) for column in zip(*parts, strict=True))
        K, E = ids.shape[1], self.info.num_experts
        records = []
        for some in torch.arange(len(ids)).split(max(1, HELD // (8 * K * output.shape[1]))):
            outputs = torch.stack(
                [self._run(hidden[some], ids[some, k : k + 1], gates) for k in range(K)]
            )  # [K,n,H]
            real = (ids[some] < E).T[..., None]
            total = (gates[some].T[..., None].double() * outputs.where(real, 0)).sum(0)
            try:
                measure.check_sum(total.float(), output[some])
            except ReapError as error:
                raise ReapError(f"{self.where} cannot be measured: {error}") from error
            records.append(records_of(outputs, ids[some], gates[some], E))
        self._errors = tuple(
            PairErrors(
                experts=pair,
                both=costs_of(of.gates, of.norms, of.apart),
                **self._either(pair, hidden, ids, gates),
                prune_shared=shared_costs(of),
            )
            for pair, of in often(together(records), **self.limits).items()
        )

    def _either(
        self, pair: tuple[int, int], hidden: Tensor, ids: Tensor, gates: Tensor
    ) -> dict[str, Any]:
        """What is measured over the tokens that chose one of the pair or both, with any gate."""
        each = [torch.where(ids == expert, gates.double(), 0).sum(1) for expert in pair]
        weights = torch.stack(each, 1)  # [T,2]
        rows = (weights.sum(1) > 0).nonzero().flatten()
        weights = weights[rows]
        group = Group(pair, tuple((weights > 0).sum(0).tolist()))
        columns: list[tuple[Tensor, ...]] = []
        step = max(1, HELD // (24 * hidden.shape[1]))
        for some, g in zip(rows.split(step), weights.split(step), strict=True):
            x = hidden[some]
            first, second = (self._run(x, self._ids(ids, x, e), gates) for e in pair)
            change = torch.zeros_like(g[:, 0])
            if self.rows is not None:
                with tied((quantity, group) for quantity in self.rows):
                    mean = self._run(x, self._ids(ids, x, pair[0]), gates)
                gone = g[:, :1] * (first - mean) + g[:, 1:] * (second - mean)
                change = gone.square().sum(1)
            norms = [torch.linalg.vector_norm(y, dim=1) for y in (first, second)]
            columns.append((torch.stack(norms, 1), (first - second).square().sum(1), change))
        norm, apart, changes = (torch.cat(column).cpu() for column in zip(*columns, strict=True))
        return {
            "either": costs_of(weights.cpu(), norm, apart),
            "merge_weights": None if self.rows is None else float(changes.mean()),
        }

    @staticmethod
    def _ids(ids: Tensor, hidden: Tensor, expert: int) -> Tensor:
        """One expert for every token [T,1]."""
        return ids.new_full((len(hidden), 1), expert)

    def _run(self, hidden: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        """f of one expert per token, [T,H] fp64; `gates` says the dtype of gates."""
        one = torch.ones(ids.shape, dtype=gates.dtype, device=gates.device)
        y = self.forward(hidden, ids, one).reshape(len(ids), -1).double()
        if not bool(y.isfinite().all()):
            raise ReapError(
                f"layer {self.info.name}: an expert's output is NaN or infinite: check the model's "
                "weights and dtype"
            )
        return y


def _alone(experts: Experts) -> measure.Forward:
    """What runs expert ids [T,1] with gates [T,1] on hidden states [T,H]. It calls the forward
    alone, so that no hook hears of it."""
    module = experts.module

    def run(hidden: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        if experts.kind == "direct":  # some squeeze a single slot away: a second one, with gate 0
            ids, gates = ids.expand(-1, 2), torch.cat([gates, torch.zeros_like(gates)], 1)
        return module.forward(hidden, ids, gates)

    return run
