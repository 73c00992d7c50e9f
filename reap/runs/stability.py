"""A calibration that ends when it is sure which experts a ratio drops.

The sums of all experts are read after every so many batches (a cut); between two cuts lies a group
of batches, the unit of all errors (`reap.planning.confidence`). Groups grow with the text: when
there are 64, every other cut is forgotten, and they are twice as large. At 32, 40, 48 and 56 groups
is a look, so that each is at 1.14 to 1.25 times the text of the one before.

A swap is possible where, by that error, a dropped expert may score above a kept one of its layer
(of its router group, where there are such). With probability `confidence` none is missed at any
look of the run: by Bonferroni, over all pairs of experts, for any could be such two, and over the
looks, of which the i-th has 1/(i*(i+1)) of what may go wrong. This is said of text like that so
far: of text that comes sorted, one kind after another, the first part tells nothing of the rest.

All this depends on numbers of batches and exact sums alone, never on time: the same command ends at
the same batch. What it remembers, the rounded sums at the cuts, goes into the file of a run that
ended early, so that one that goes on has the same bits. Layer by layer the batches of a wave come
to their ends together: its looks are those of a run in memory, and it ends behind the wave, of
which none is larger than half of all text before it (the first has what the first look needs).
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reap.errors import ReapError
from reap.files.units import counted
from reap.model.info import LayerInfo, ModelInfo
from reap.planning.confidence import (
    RATIOS,
    Ratios,
    check_ratio_criterion,
    most_ahead,
    ratios,
)
from reap.planning.counting import Ratio, kept_counts, share_of
from reap.planning.criteria import rank
from reap.planning.plan import select
from reap.runs.cuts import GROUPS, LOOKS, WAVES, next_look
from reap.runs.cutsums import Exact
from reap.statistics.stats import Statistics
from reap.text.batching import Batches


@dataclass(frozen=True)
class Stable:
    """When a calibration may end: when the experts that `ratio` drops by `criterion` were the same
    at `looks` looks in a row, and no swap is possible with `confidence`. Of two experts whose
    scores differ by less than the share `tie` of the weakest that is kept, either may go. ReapError
    for a value that makes no sense, or a criterion without a standard error."""

    ratio: Ratio
    criterion: str = "reap"
    confidence: float = 0.95
    looks: int = 2
    tie: float = 0.0

    def __post_init__(self) -> None:
        if not share_of(self.ratio):
            raise ReapError("ratio is 0: a calibration until it is stable needs experts to drop")
        check_ratio_criterion(self.criterion)
        for name, value, least in (("confidence", self.confidence, 0.5), ("tie", self.tie, 0)):
            if type(value) not in (int, float) or not least <= value < 1:
                raise ReapError(f"{name} is {value!r}: it must be at least {least} and less than 1")
        if type(self.looks) is not int or self.looks < 1:
            raise ReapError(f"looks is {self.looks!r}: it must be a whole number of 1 or more")

    def check(self, model: ModelInfo) -> list[int]:
        """How many experts of each layer stay. ReapError where the router could not do with so
        many, or none would go."""
        counts = kept_counts(model.layers, ratio=self.ratio)
        if counts == [layer.num_experts for layer in model.layers]:
            raise ReapError(
                f"ratio {self.ratio} drops no expert of {model.name}: give a larger one"
            )
        return counts

    def check_text(self, text: Batches) -> None:
        """ReapError for text that is known to have too few batches for a single look."""
        about = text.describe()
        if text.expected is None or not about["packing"]:
            return
        most = text.expected / (about["seq_len"] * about["batch_size"]) + len(about["sources"])
        if most < GROUPS:
            raise ReapError(
                f"about {text.expected:,} tokens are some {round(most)} batches, and nothing can "
                f"be said of fewer than {GROUPS}: give more text, or a smaller batch_size or "
                "seq_len, or do without until_stable"
            )

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        return {**vars(self), "ratio": str(self.ratio)}


@dataclass(frozen=True)
class Cut:
    """What had been summed after some batches: [2,C] fp64, what the criterion divides and by what,
    of the experts of all layers, one layer after another. `text`: the same, for a file."""

    values: Tensor
    text: str

    @classmethod
    def of(cls, values: Tensor) -> Cut:
        return cls(values, base64.b64encode(values.numpy().astype("<f8").tobytes()).decode())

    @classmethod
    def read(cls, text: str, experts: int) -> Cut:
        values = np.frombuffer(base64.b64decode(text, validate=True), "<f8").astype("f8")
        return cls(torch.from_numpy(values).view(2, experts), text)


class Watch:
    """Of one run: counts its batches, and says when it may end. `streamed`: it runs layer by layer,
    where batches end together, wave by wave."""

    def __init__(self, until: Stable, model: ModelInfo, streamed: bool = False) -> None:
        self._until, self._streamed = until, streamed
        self._layers = list(zip(model.layers, until.check(model), strict=True))
        self._experts = [layer.num_experts for layer in model.layers]
        self._pairs = sum(
            layer.n_group * math.comb(layer.num_experts // layer.n_group, 2)
            for layer in model.layers
        )
        self.sums = Exact(model, until.criterion)
        self.batches = 0
        self._bound: int | None = None
        self._size = 1  # batches of a group
        self._cuts: list[Cut] = []
        self._looks = 0
        self._looked_at = 0  # batches
        self._dropped: dict[str, list[int]] = {}  # at the last look, by layer
        self._same = 0  # looks in a row with that
        self._open: dict[str, int] = {}  # layer -> experts that could swap, at the last look
        self.stable = False

    def batch(self, *parts: Statistics) -> bool:
        """One more batch is in the statistics of this run, the sum of `parts`. Whether the run may
        end."""
        self.passed(self.batches + 1, lambda: self.sums.read(parts))
        return self.stable

    def passed(self, batches: int, sums: Callable[[], np.ndarray]) -> None:
        """So many are behind the run, and `sums` are theirs; at most one more than it knew of."""
        if batches > self.batches:
            self.batches = batches
            if batches % self._size == 0:
                self._cut(self.sums.rounded(sums()))

    def bound(self) -> int | None:
        """At how many batches the run has to call `meet`, before it runs more; None: never."""
        self._bound = next_look(self.batches, WAVES) if self._streamed else None
        return self._bound

    def meet(self, batches: int, save: Callable[[], None] = lambda: None) -> bool:
        """The run is at so many batches, its bound or the end of its text. Whether there is more to
        run. Nothing is decided here that `save` would have to write."""
        return batches == self._bound and not self.stable

    def _cut(self, values: Tensor) -> None:
        self._cuts.append(Cut.of(values))
        if len(self._cuts) == 2 * GROUPS:
            self._cuts, self._size = self._cuts[1::2], 2 * self._size
        if len(self._cuts) in LOOKS and not self.stable:
            self._look()

    def ended(self) -> str:
        """Why the run ended, with its text or before."""
        what = f"the experts that ratio {self._until.ratio} drops by {self._until.criterion}"
        sure = f"with {self._until.confidence:.4g} confidence"
        if self.stable:
            more = self.batches - self._looked_at
            later = f" (and {more:,} more of its wave)" if more else ""
            return (
                f"stable after {self._looked_at:,} batches{later}: {what} were the same at "
                f"{counted(self._same, 'look')}, and {sure} none could swap"
            )
        if not self._looks:
            return (
                f"text used up, not stable: {self.batches:,} batches are too few to look at, "
                f"{GROUPS} are needed"
            )
        return f"text used up, not stable: {self._said(what, sure)}"

    def _said(self, what: str, sure: str) -> str:
        """What the last look saw."""
        when = f"after {self._looked_at:,} batches"
        if not self._open:
            return f"{what} were the same at {self._same} of {self._until.looks} looks ({when})"
        experts, layers = sum(self._open.values()), len(self._open)
        could = f"{counted(experts, 'expert')} in {counted(layers, 'layer')} could still swap"
        return f"{sure} {could} ({when})"

    def state(self) -> dict[str, Any]:
        """All that it remembers, as JSON."""
        return {
            "size": self._size,
            "cuts": [cut.text for cut in self._cuts],
            "looks": self._looks,
            "looked_at": self._looked_at,
            "dropped": self._dropped,
            "same": self._same,
            "open": self._open,
            "stable": self.stable,
        }

    def restore(self, batches: int, state: Any) -> None:
        """Go on from what `state` gave after so many batches. ReapError when it did not."""
        try:
            self.batches, self._size, self._looks = batches, state["size"], state["looks"]
            self._cuts = [Cut.read(text, sum(self._experts)) for text in state["cuts"]]
            self._looked_at, self._same = state["looked_at"], state["same"]
            self._dropped, self._open = dict(state["dropped"]), dict(state["open"])
            self.stable = state["stable"]
            fits = len(self._cuts) == batches // self._size
        except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError):
            fits = False
        if not fits:
            raise ReapError("what an earlier run knew of its stability is damaged: begin anew")

    def _look(self) -> None:
        self._looks += 1
        self._looked_at = self.batches
        cuts = torch.stack([cut.values for cut in self._cuts]).split(self._experts, dim=2)
        changed, self._open = not self._dropped, {}
        for (layer, count), own in zip(self._layers, cuts, strict=True):
            view = self._view(layer, count, own)
            if could := view.swaps():
                self._open[layer.name] = could
            changed |= view.changed(self._dropped.get(layer.name, []))
            self._dropped[layer.name] = view.dropped.tolist()
        self._same = 1 if changed else self._same + 1
        self.stable = not self._open and self._same >= self._until.looks

    def _view(self, layer: LayerInfo, count: int, cuts: Tensor) -> View:
        """Of a layer of which `count` experts stay, at `cuts` [G,2,E] fp64."""
        above, below = cuts[-1]
        mean = RATIOS[self._until.criterion][1] == "count"
        # As a plan has it: dividing by tokens, the same for all, would only round.
        kept = select(layer, rank(above / below.clamp(min=1) if mean else above), count, ())
        sums, counts = torch.diff(cuts, dim=0, prepend=torch.zeros_like(cuts[:1])).unbind(1)
        wrong = (1 - self._until.confidence) / (self._looks * (self._looks + 1))
        return View(
            layer=layer,
            of=ratios(sums, counts),
            kept=torch.tensor(kept),
            dropped=torch.tensor(sorted({*range(layer.num_experts)} - {*kept}), dtype=torch.int64),
            routed=below > 0 if mean else above != 0,
            tail=wrong / self._pairs,
            tie=self._until.tie,
        )


@dataclass(frozen=True)
class View:
    """One layer at a look: the scores of its experts, those that are `kept` and `dropped` [E']
    int64, and those that any token was `routed` to [E] bool."""

    layer: LayerInfo
    of: Ratios
    kept: Tensor
    dropped: Tensor
    routed: Tensor
    tail: float
    tie: float

    def swaps(self) -> int:
        """How many experts could change places with another. Those without tokens are left out:
        they score 0 by definition, and text of this kind has no use for them. All of a layer
        without any token could."""
        if not self.routed.any():
            return self.layer.num_experts
        could = 0
        routed_ones = (some[self.routed[some]] for some in (self.dropped, self.kept))
        for dropped, kept in self._by_group(*routed_ones):
            ahead = most_ahead(self.of, dropped, kept, self.tail)
            swap = ahead >= self._margin(kept)
            could += int(swap.any(0).sum() + swap.any(1).sum())
        return could

    def changed(self, before: list[int]) -> bool:
        """Whether others than those of `before` are dropped, and it is no tie."""
        now = {*self.dropped.tolist()}
        new, back = (torch.tensor(sorted(some)) for some in (now - {*before}, {*before} - now))
        score = self.of.score
        return any(
            float(score[back].max() - score[new].min()) > self._margin(self.kept)
            for new, back in self._by_group(new.long(), back.long())
        )

    def _margin(self, kept: Tensor) -> float:
        return self.tie * float(self.of.score[kept].abs().min())

    def _by_group(self, first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The experts of both in each router group that has some of either."""
        size = self.layer.num_experts // self.layer.n_group
        for group in range(self.layer.n_group):
            own = first[first // size == group], second[second // size == group]
            if all(map(len, own)):
                yield own
