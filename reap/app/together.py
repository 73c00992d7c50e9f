"""A calibration by several processes: alone, as a shard that knows of no other, or as ranks that
torchrun started, of which rank 0 talks and writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap.app import console
from reap.app.arguments import LoadOptions, MeasureOptions
from reap.errors import ReapError

if TYPE_CHECKING:
    from reap.files.lock import Lock
    from reap.runs.partial import Partial
    from reap.runs.ranks import Ranks
    from reap.runs.stability import Stable
    from reap.statistics.stats import Statistics
    from reap.text.batching import Batches
    from reap.text.share import Share


class Together:
    """What of a run is this process's part, and what the others have to agree to."""

    def __init__(self, share: Share | None = None, ranks: Ranks | None = None) -> None:
        self.share, self.ranks = share, ranks
        self._rank, self._size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
        self._lock: Lock | None = None

    @property
    def writes(self) -> bool:
        """Whether this process writes what all of them measured."""
        return self._rank == 0

    def said(self) -> str | None:
        """For the first line of the run."""
        if self.ranks is not None:
            return f"{self._size} ranks"
        return None if self.share is None else f"shard {self.share.number}/{self.share.of}"

    def device(self, device: str) -> str:
        """That of this process. ReapError for one that several cannot have."""
        from reap.runs.ranks import own_device

        return device if self.ranks is None else own_device(device)

    def partial_file(self, out: Path) -> Path:
        """Where this process keeps what it measures. ReapError when another number of ranks left
        theirs beside `out`, or another run is at work on it."""
        from reap.files.lock import Lock
        from reap.runs.rankfiles import rank_file, refuse_others

        if self.writes:
            refuse_others(out, self._size)
        if self.writes and self.ranks is not None:
            self._lock = Lock(rank_file(out))  # holds off a run in one process
        return rank_file(out, self._rank, self._size)

    def check_same(
        self,
        folder: Path,
        rows: Batches,
        measuring: MeasureOptions,
        loading: LoadOptions,
        out: Path,
        until: Stable | None = None,
    ) -> None:
        """ReapError unless all ranks are about to run the same, and rank 0 sees their files."""
        if self.ranks is None:
            return
        from reap.files.safefile import read_json
        from reap.model.identity import weights_fingerprint
        from reap.runs.rankfiles import check_shared

        rows.read_ahead(limit=1)  # of text that is not read before it runs
        self.ranks.agree(
            _versions()
            | rows.describe()
            | vars(measuring)
            | {
                "dtype": loading.dtype,
                "device": loading.device.split(":")[0],
                "the model's config.json": read_json(folder / "config.json"),
                "the hash of the model's weights": weights_fingerprint(folder),
                "the hash of the text": rows.beginning(),
                "the output": str(out),
                "until_stable": None if until is None else until.describe(),
            }
        )
        if self.writes:
            check_shared(out, self._size)

    def check_same_run(self, model: Any, measuring: MeasureOptions) -> None:
        """ReapError unless all ranks run the loaded model alike."""
        if self.ranks is not None:
            from reap.runs.calibration import what_runs

            self.ranks.agree(what_runs(model, measuring.backend, measuring.deterministic))

    def sum_of_all(
        self, stats: Statistics, partial: Partial, rows: Batches, out: Path
    ) -> Statistics:
        """In the process that writes the statistics of all, when they have theirs; in others their
        own, when all is written."""
        if self.ranks is None:
            return stats
        from reap.runs.rankfiles import sum_of_ranks

        partial.complete(stats, rows)
        self.ranks.wait_for_all()
        return sum_of_ranks(out, self._size) if self.writes else stats

    def release(self) -> None:
        """What all measured is written: the others need not wait any more."""
        if self.ranks is not None:
            self.ranks.release()
        if self._lock is not None:
            self._lock.release()


@contextmanager
def together(shard: str | None) -> Iterator[Together]:
    """This process's part, and inside the `with` the connection to the others, if there are any.
    ReapError for a shard that there is not, and for one by several ranks."""
    from reap.runs.ranks import Ranks, world
    from reap.text.share import Share

    share = None if shard is None else Share.parse(shard)
    rank, size = world()
    if size == 1:
        yield Together(share)
        return
    if share is not None:
        raise ReapError(
            f"--shard {shard} in a run of {size} ranks: these share the work by themselves: give "
            "one or the other"
        )
    ranks = Ranks()
    try:
        with ExitStack() as inside:
            if rank:
                inside.enter_context(console.silence())
            inside.enter_context(ranks)
            yield Together(Share(rank, size), ranks)
    finally:
        console.quiet = not ranks.speaks


def _versions() -> dict[str, Any]:
    """Of all that decides what is computed, of text and of numbers."""
    import platform

    from reap import versions

    packages = ("reap-saliency", "torch", "transformers", "tokenizers", "triton")
    return {"reap": versions.OWN, "python": platform.python_version()} | {
        f"the version of {name}": release for name, release in versions.installed(*packages).items()
    }
