"""A calibration by several ranks that ends when it is sure: where they meet, and what is said.

Each rank reads its own exact sums at the cuts of all batches (`reap.runs.stability`). Where a look
is due all wait for each other; rank 0 adds what they have, rounds it, looks, and says whether the
run ends. So all end at the same batch, that of one process, whoever is faster. Rank 0 writes what
it knows before it says it: whatever rank is killed when, none knows of a look that rank 0 has not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from reap.errors import ReapError
from reap.model.info import ModelInfo
from reap.runs.cuts import LOOKS, WAVES, cuts_between, next_look
from reap.runs.ranks import Ranks
from reap.runs.stability import Stable, Watch


class Meetings:
    """A `Watch` of this rank and the others, with what that has. Layer by layer (`streamed`) they
    meet more seldom, so that waves are large."""

    def __init__(self, until: Stable, model: ModelInfo, streamed: bool, ranks: Ranks) -> None:
        self._watch = Watch(until, model)  # of all, in rank 0
        self._places = WAVES if streamed else LOOKS
        self._ranks = ranks
        self.sums = self._watch.sums
        self.batches = 0
        # Own sums since the last meeting, by cut, and the same as text.
        self._own: dict[int, tuple[np.ndarray, str]] = {}
        self._met = (0, False)  # batches, and whether that was all of the text
        self._known = self._said()  # of meetings that rank 0 had, in an earlier run too
        self.stable = False
        self._why = ""

    def start(self) -> None:
        """Before the first batch, and behind what an earlier run measured."""
        self._known = self._ranks.exchange(list(self._met), lambda _: self._said())
        if self._met > tuple(self._known["met"]):
            raise ReapError(
                f"rank {self._ranks.rank} was at {self._met[0]:,} batches when an earlier run "
                "ended, which rank 0 knows nothing of: remove the files of all ranks to begin anew"
            )

    def passed(self, batches: int, sums: Callable[[], np.ndarray]) -> None:
        """So many batches of all are behind; of those that were this rank's `sums` are."""
        cuts = [*cuts_between(self.batches, batches)]
        if cuts:
            own = sums()
            self._own |= dict.fromkeys(cuts, (own, self.sums.written(own)))
        self.batches = max(self.batches, batches)

    def bound(self) -> int:
        """At how many batches of all this rank has to call `meet`, before it runs more."""
        return next_look(self._met[0], self._places)

    def meet(self, batches: int, save: Callable[[], None] = lambda: None) -> bool:
        """The run is at so many batches of all, its bound or the end of its text: decide with the
        others. `save` writes what this rank knows. Whether there is more to run."""
        self._met = batches, batches < self.bound()
        if self._met <= tuple(self._known["met"]):  # others were there before
            at_last = self._met == tuple(self._known["met"])
            said: dict[str, Any] = self._known if at_last else {"stable": False, "ended": ""}
        elif self._ranks.rank:
            own = {str(cut): text for cut, (_, text) in self._own.items()}
            said = self._ranks.exchange(own, lambda _: None)
        else:
            said = self._ranks.exchange(None, lambda given: self._decide(given, save))
        self._own = {}
        self.stable, self._why = said["stable"], said["ended"]
        return not (self.stable or self._met[1])

    def ended(self) -> str:
        """Why the run ended, with its text or before."""
        return self._why

    def state(self) -> dict[str, Any]:
        """All that it remembers, as JSON."""
        return self._said() | {
            "own": {str(cut): text for cut, (_, text) in self._own.items()},
            "of_all": None if self._ranks.rank else self._watch.state(),
        }

    def restore(self, batches: int, state: Any) -> None:
        """Go on from what `state` gave after so many batches. ReapError when it did not."""
        try:
            met, final = state["met"]
            own = {int(cut): text for cut, text in state["own"].items()}
            self._own = {cut: (self.sums.parsed(text), text) for cut, text in own.items()}
            self._met, self.batches = (int(met), bool(final)), batches
            self.stable, self._why = state["stable"], state["ended"]
            fits = sorted(own) == [*cuts_between(met, batches)]
        except (KeyError, TypeError, ValueError, AttributeError):
            fits = False
        if not fits:
            raise ReapError("what an earlier run knew of its stability is damaged: begin anew")
        if not self._ranks.rank:
            self._watch.restore(met, state["of_all"])

    def _said(self) -> dict[str, Any]:
        """What there is to know of the last meeting."""
        if not self._met[0]:
            return {"met": [0, False], "stable": False, "ended": ""}
        return {"met": list(self._met), "stable": self.stable, "ended": self._why}

    def _decide(self, given: Iterator[Any], save: Callable[[], None]) -> dict[str, Any]:
        """Rank 0: what comes of the sums of all."""
        next(given)  # its own
        total = {cut: own for cut, (own, _) in self._own.items()}
        for theirs in given:
            if theirs.keys() != {str(cut) for cut in total}:
                raise ReapError("the ranks counted different batches: start all ranks again")
            for cut, text in theirs.items():
                total[int(cut)] = total[int(cut)] + self.sums.parsed(text)
        for cut, sums in sorted(total.items()):
            self._watch.passed(cut, lambda sums=sums: sums)  # type: ignore[misc]
        self._watch.passed(self._met[0], self.sums.none)  # no cut any more
        self._own, self.stable = {}, self._watch.stable
        self._why = self._watch.ended() if self.stable or self._met[1] else ""
        save()
        return self._said()
