"""What a calibration has measured: kept in a file while it runs, and taken up when it ended early.

The file is one of statistics, with sums of whole batches alone. Its one `data` entry is that of the
run so far, and "partial" in it says how many batches that were, of all shares of the run. Sums are
exact, so that a run in pieces has the bits of a run in one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from reap.errors import ReapError, undisturbed
from reap.files.atomic import discard_unfinished
from reap.files.lock import Lock
from reap.statistics.stats import Statistics, installed_versions
from reap.statistics.trace import Trace
from reap.text.batching import Batch, Batches

log = logging.getLogger("reap")

_SHARE = 0.02  # of the time, at most, goes into remembering
_WRITE_SHARE = 0.01  # of the time, at most, goes into writing, where ...
_WRITE_SECONDS = 30.0  # ... that is no more often
# Of a data entry; the rest of it are options.
_PROGRESS = ("tokens", "counted", "partial", "sources")
_SOURCE_OPTIONS = ("spec", "kind", "target", "domain", "weight", "column", "python")
_SOURCE_PROGRESS = ("rows", "tokens", "sha256")


class Remembers(Protocol):
    """What of a run is no statistics, and has to go on too."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, batches: int, state: Any) -> None: ...


class _Refused(ReapError):
    """The file is of another run."""


class Partial:
    """The file `path`, of one run at a time. A run that ends early inside `kept` leaves it, one
    that is killed leaves it as it was last written, synced; the next run with the same model, text
    and options takes it up. A run that completes removes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock(path)
        discard_unfinished(path)
        self._before: Statistics | None = None
        self._watch: Remembers | None = None
        self._changed: set[str] = set()  # domains since what is remembered
        self._remember_at = 0.0
        # Of whole batches: statistics by domain, and the data entry; then what was written of them.
        self._whole: tuple[dict[str, Statistics], dict[str, Any]] | None = None
        self._written: Statistics | None = None
        self._write_at = time.monotonic() + _WRITE_SECONDS
        if path.exists():
            try:
                loaded = Statistics.load(path)
            except ReapError as error:  # cut short, say, or of a newer version
                raise ReapError(
                    f"what an earlier run left cannot be read: {error}: remove the file to begin "
                    "anew"
                ) from error
            if len(loaded.data) != 1 or "partial" not in loaded.data[0]:
                raise ReapError(f"{path} is not what a run left that ended early: move it away")
            self._before = loaded

    def refuse_other(self, data: dict[str, Any]) -> None:
        """ReapError when the file is of a run whose options differ from those of `data`, in what
        is known there."""
        if self._before is None:
            return
        (kept,) = self._before.data
        pairs: list[tuple[str, Any, Any]] = [
            (name, kept.get(name), data.get(name))
            for name in dict.fromkeys((*data, "shard"))
            if name not in _PROGRESS
        ]
        versions = self._before.versions
        pairs += [(name, versions.get(name), now) for name, now in installed_versions().items()]
        for number, source in enumerate(data["sources"]):
            before = kept["sources"][number] if number < len(kept["sources"]) else {}
            pairs += [
                (f"{name} of data {source['spec']!r}", before.get(name), source.get(name))
                for name in _SOURCE_OPTIONS
            ]
        pairs.append(("the number of sources", len(kept["sources"]), len(data["sources"])))
        for name, before, now in pairs:
            if before != now:
                self._refuse(f"{name} was {before}, and is {now}")

    def refuse_trace(self, trace: Trace | None) -> None:
        """ReapError when there is one, and an earlier run measured what it would lack."""
        if trace is not None and self._before is not None:
            self._refuse(f"the trace {trace.path} would lack that")

    def take_up(
        self,
        stats: Statistics,
        batches: Batches,
        data: dict[str, Any],
        watch: Remembers | None = None,
    ) -> Iterator[Batch]:
        """Yield the batches that the file has; `batches` and `watch` are then behind them. `stats`
        are those of the run. ReapError when model, text or options are not the same."""
        self._watch = watch
        self.refuse_other({"until": None} | batches.describe() | data)
        if self._before is None:
            return
        for what in ("gates", *stats.kinds):
            if getattr(self._before, what) != getattr(stats, what):
                self._refuse(f"{what} was {getattr(self._before, what)}")
        difference = self._before.model.difference(stats.model)
        if difference:
            self._refuse(f"it is of another model: {difference}")
        (kept,) = self._before.data
        batches.until = kept["partial"]["batches"]  # a share passes no batch of its own by
        yield from batches
        batches.until = None
        now = batches.describe()["sources"]
        for before, after in zip(kept["sources"], now, strict=True):
            if any(before[name] != after[name] for name in _SOURCE_PROGRESS):
                self._refuse(f"the text of {after['spec']!r} changed")
        if watch is not None:
            watch.restore(batches.position, kept["partial"].get("until"))

    def mark(self, stats: Statistics, domain: str, batches: Batches, data: dict[str, Any]) -> None:
        """A batch of `domain` is whole: remember `stats` as they are, unless that was done a moment
        ago. Waits for a GPU only now and then, to know that what is remembered is sound."""
        self._changed.add(domain)
        start = time.monotonic()
        if start < self._remember_at:
            return
        parts = self._remember(stats, batches, data)
        end = time.monotonic()
        self._remember_at = end + (end - start) / _SHARE
        if end >= self._write_at:
            for part in parts.values():
                part.check()
            try:
                self.save()
            except ReapError as error:  # a full disk, say: the run may still end well
                log.warning("what was measured so far is not kept: %s", error)
            done_at = time.monotonic()
            self._write_at = done_at + max(_WRITE_SECONDS, (done_at - end) / _WRITE_SHARE)

    def keep(
        self, stats: Statistics, domains: list[str], batches: Batches, data: dict[str, Any]
    ) -> None:
        """A wave is whole, of one batch of each of `domains`: write the file now."""
        self._changed.update(domains)
        self._remember(stats, batches, data)
        self.save()

    def _remember(
        self, stats: Statistics, batches: Batches, data: dict[str, Any]
    ) -> dict[str, Statistics]:
        before = {} if self._whole is None else self._whole[0]
        parts = {**before, **{name: stats.snapshot(name) for name in self._changed}}
        self._whole = parts, batches.describe() | data | {"partial": self._progress(batches)}
        self._changed = set()
        return parts

    def _progress(self, batches: Batches) -> dict[str, Any]:
        until = {} if self._watch is None else {"until": self._watch.state()}
        return {"batches": batches.position, **until}

    def complete(self, stats: Statistics, batches: Batches) -> None:
        """Write the statistics of a run that has all of its batches, for another process to add."""
        (data,) = stats.data
        stats.data = [data | batches.describe() | {"partial": self._progress(batches)}]
        stats.save(self.path, overwrite=True)
        self._whole, self._written = None, stats

    def both(self, stats: Statistics) -> list[Statistics]:
        """`stats` and what the file has, if anything."""
        return [stats] if self._before is None else [self._before, stats]

    def total(self, stats: Statistics) -> Statistics:
        """The sum of both."""
        return stats if self._before is None else self._before + stats

    def save(self) -> Statistics | None:
        """Write the whole batches of this run and those of the file. What the file then has; None
        for no file."""
        if self._whole is not None:
            parts, data = self._whole
            stats = sum(parts.values(), 0 if self._before is None else self._before)
            assert isinstance(stats, Statistics)
            try:
                stats.check()
            except ReapError:  # a NaN that a GPU did not report before
                return self._before if self._written is None else self._written
            stats.data = [data]
            stats.save(self.path, overwrite=True)
            self._written = stats
        return self._before if self._written is None else self._written

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Of a run that ends early inside, the file; of one that completes, no file."""
        try:
            yield
        except _Refused:
            raise
        except BaseException as error:
            try:
                with undisturbed():
                    notes = self._left()
                    if notes:  # as `add_note` of Python 3.11 has it
                        error.__notes__ = notes + getattr(error, "__notes__", [])  # type: ignore[attr-defined]
            except KeyboardInterrupt as later:
                later.__notes__ = getattr(error, "__notes__", [])  # type: ignore[attr-defined]
                raise
            raise
        else:
            self.path.unlink(missing_ok=True)
        finally:
            self._lock.release()

    def _left(self) -> list[str]:
        """Write what there is, and say so."""
        with suppress(ReapError):  # a full disk, say: the first error is the one to tell
            saved = self.save()
            if saved is not None and saved.tokens:
                return [
                    f"what was measured so far, {saved.tokens:,} tokens, is in {self.path}: "
                    "the same command goes on from there"
                ]
        return []

    def _refuse(self, reason: str) -> None:
        raise _Refused(
            f"{self.path} holds what an earlier run measured, but {reason}: give that run's "
            "command to go on, or remove the file to begin anew"
        )
