"""Groups of batches, and where looks are."""

from __future__ import annotations

from test_stability import Run

from reap.runs.cuts import WAVES, cuts_between, next_cut, next_look
from reap.runs.stability import Stable, Watch


def test_where_groups_and_looks_are() -> None:
    """By number of batches alone, as they come about when a run counts them."""
    run = Run([1.0] * 4 + [1.001] * 4, layers=1)
    watch, cuts, looks = Watch(Stable(0.5), run.model), [], []
    for batches in range(1, 400):
        run.batch()
        before = len(watch._cuts), watch._size
        watch.batch(run.stats)
        cuts += [batches] * (before != (len(watch._cuts), watch._size))
        looks += [batches] * (watch._looked_at == batches)
        assert next_cut(batches) == next(
            n for n in range(batches, 999) if [*cuts_between(n - 1, n)]
        )
    assert cuts == [*cuts_between(0, 399)] and cuts[60:70] == [
        61,
        62,
        63,
        64,
        66,
        68,
        70,
        72,
        74,
        76,
    ]
    assert looks[:2] == [next_look(0), next_look(32)] and next_look(33) == 40
    assert all(next_look(one) == other for one, other in zip(looks, looks[1:], strict=False))
    assert [next_look(n, WAVES) for n in (0, 31, 32, 48, 64, 95, 96)] == [
        32,
        32,
        48,
        64,
        96,
        96,
        128,
    ]
