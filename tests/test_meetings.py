"""Runs that end when they are sure, layer by layer and by several ranks: at a place, and with the
bits, of one process in memory."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
from folders import saved
from letters import Tokenizer
from processes import Forked
from tiny import tiny_model

from reap.app.arguments import LoadOptions, MeasureOptions
from reap.app.together import Together, together
from reap.errors import ReapError
from reap.model.load import load_model
from reap.runs.calibration import calibrate
from reap.runs.meetings import Meetings
from reap.runs.partial import Partial
from reap.runs.rankfiles import PARTIAL, rank_file
from reap.runs.stability import Stable
from reap.runs.waves import calibrate_streamed
from reap.statistics.stats import Statistics
from reap.text.batching import Batches, batches

LOOSE = Stable(0.25, confidence=0.5, tie=0.9, looks=2)  # at 40 batches
NEVER = Stable(0.25)
TINY: dict[str, Any] = {"num_hidden_layers": 2}


class Stop(Exception):
    pass


@pytest.fixture
def here(tmp_path: Path, monkeypatch: Any) -> Path:
    """What is measured is written often."""
    monkeypatch.setattr("reap.runs.partial._SHARE", float("inf"))
    monkeypatch.setattr("reap.runs.partial._WRITE_SECONDS", 0.1)
    monkeypatch.setattr("reap.runs.partial._WRITE_SHARE", float("inf"))
    saved(tmp_path / "model", **TINY)
    words = [f"row {number} of several" for number in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in words))
    (tmp_path / "b.txt").write_text("other text of another kind; " * 20)
    return tmp_path


def text(here: Path, us: Together | None = None, until: int | None = None) -> Batches:
    specs = [str(here / "a.jsonl=2"), str(here / "b.txt")]
    share = None if us is None else us.share
    rows = batches(specs, Tokenizer(), seq_len=16, batch_size=1, shard=share)
    rows.until = until
    return rows


def in_memory(here: Path, until: Stable | None = None, stop: int | None = None) -> Statistics:
    model = load_model(here / "model", device="cpu")
    return calibrate(model, text(here, until=stop), until=until)


def streamed(here: Path, until: Stable, stop: int | None = None, **options: Any) -> Statistics:
    """Stop behind that many batches that ended their layers."""
    partial, seen = Partial(here / "kept"), 0

    def progress(_: int) -> None:
        nonlocal seen
        seen += 1
        if seen == stop:
            raise Stop

    with partial.kept():
        return calibrate_streamed(
            here / "model",
            text(here),
            partial=partial,
            until=until,
            progress=progress,
            **options,
        )


@pytest.mark.parametrize(
    ("wave", "ends"), [(None, 48), (5, 42), pytest.param(7, 46, marks=pytest.mark.slow)]
)
def test_layer_by_layer(here: Path, wave: int | None, ends: int) -> None:
    """The looks are those of a run in memory, the end is that of the wave."""
    plain = in_memory(here, LOOSE)
    found = streamed(here, LOOSE, wave_tokens=wave and wave * 16)
    (data,), (expected,) = found.data, plain.data
    assert expected["ended"].startswith("stable after 40 batches: ")
    more = f" (and {ends - 40} more of its wave)" if ends > 40 else ""
    assert data["ended"] == expected["ended"].replace(" batches", f" batches{more}", 1)
    there = in_memory(here, stop=ends)
    assert found.digest() == there.digest() and found.tokens == there.tokens
    assert data["sources"] == there.data[0]["sources"]


@pytest.mark.parametrize("stops", [pytest.param([70], marks=pytest.mark.slow), [20, 45]])
def test_layer_by_layer_in_pieces(here: Path, stops: list[int]) -> None:
    whole = streamed(here, LOOSE, wave_tokens=5 * 16)
    for stop in stops:
        with pytest.raises(Stop):
            streamed(here, LOOSE, stop, wave_tokens=5 * 16)
    pieces = streamed(here, LOOSE, wave_tokens=5 * 16)
    assert pieces.digest() == whole.digest() and pieces.data == whole.data


def test_what_one_mode_left_the_other_takes_up(here: Path) -> None:
    """Groups that are half full among it."""
    whole = in_memory(here, NEVER)
    with pytest.raises(Stop):
        streamed(here, NEVER, 2 * 75, wave_tokens=3 * 16)
    (kept,) = Statistics.load(here / "kept").data
    assert kept["partial"]["batches"] == 73
    partial = Partial(here / "kept")
    with partial.kept():
        model = load_model(here / "model", device="cpu")
        found = calibrate(model, text(here), partial=partial, until=NEVER)
    assert found.digest() == whole.digest() and found.data == whole.data
    assert streamed(here, NEVER, wave_tokens=3 * 16).data == whole.data


def test_batches_of_any_loader(here: Path) -> None:
    rows = [{"input_ids": batch.input_ids} for batch in text(here)]
    found = calibrate_streamed(here / "model", rows, until=LOOSE)
    expected = calibrate(load_model(here / "model", device="cpu"), rows[:48])
    assert found == expected
    assert found.data[0]["ended"].startswith("stable after 40 batches (and 8 more")


def run(here: Path, until: Stable = LOOSE, stream: bool = False) -> None:
    """As the command does it, a rank of several."""
    with together(None) as us:
        partial = Partial(us.partial_file(here / "out"))
        rows = text(here, us)
        us.check_same(
            here / "model", rows, MeasureOptions(), LoadOptions(device="cpu"), here / "out", until
        )
        options: dict[str, Any] = {"partial": partial, "until": until, "ranks": us.ranks}
        with partial.kept():
            if stream:
                stats = calibrate_streamed(here / "model", rows, wave_tokens=80, **options)
            else:
                stats = calibrate(load_model(here / "model", device="cpu"), rows, **options)
            total = us.sum_of_all(stats, partial, rows, here / "out")
            if us.writes:
                total.save(here / "out", overwrite=True)
            us.release()


@pytest.mark.parametrize(
    ("until", "size"),
    [
        (LOOSE, 3),
        (NEVER, 2),
        *(
            pytest.param(until, size, marks=pytest.mark.slow)
            for until, size in [(LOOSE, 2), (NEVER, 3), (LOOSE, 40), (NEVER, 40)]
        ),
    ],
)
def test_ranks_end_where_one_process_does(here: Path, size: int, until: Stable) -> None:
    in_memory(here, until).save(here / "whole")
    forked = Forked(here, size, lambda _: run(here, until))
    assert forked.wait() == [0] * size, forked.said()
    assert (here / "out").read_bytes() == (here / "whole").read_bytes()
    assert not [path for path in here.iterdir() if "partial" in path.name]


@pytest.mark.parametrize("until", [LOOSE, NEVER])
def test_ranks_layer_by_layer(here: Path, until: Stable) -> None:
    """They meet behind 32 batches, 48, 64 and so on, and end there."""
    forked = Forked(here, 2, lambda _: run(here, until, stream=True))
    assert forked.wait() == [0, 0], forked.said()
    found, plain = Statistics.load(here / "out"), in_memory(here, until)
    (data,) = found.data
    if until is NEVER:
        assert found == plain and data == plain.data[0]
    else:
        assert found == in_memory(here, stop=48)
        assert data["ended"].startswith("stable after 40 batches (and 8 more of its wave)")


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("until", [LOOSE, pytest.param(NEVER, marks=pytest.mark.slow)])
def test_ranks_killed_at_any_moment(
    here: Path, kills: int, until: Stable, monkeypatch: Any
) -> None:
    """One of them, or both: those that get through end where one process does."""
    monkeypatch.setattr("reap.runs.ranks._JOIN_SECONDS", 5.0)
    in_memory(here, until).save(here / "whole")
    started = time.monotonic()
    assert Forked(here, 2, lambda _: run(here, until)).wait() == [0, 0]
    limit, rng, killed = time.monotonic() - started, random.Random(kills), 0
    for _ in range(kills + 9):
        (here / "out").unlink(missing_ok=True)
        forked = Forked(here, 2, lambda _: run(here, until))
        if killed < kills:
            time.sleep(rng.random() * limit)
            for rank in rng.choice([(0,), (1,), (0, 1)]):
                forked.kill(rank)
                killed += 1
        if forked.wait() == [0, 0]:
            assert (here / "out").read_bytes() == (here / "whole").read_bytes()
            if killed >= kills:
                break
    assert killed >= kills and (here / "out").exists(), forked.said()
    assert not [path for path in here.iterdir() if PARTIAL in path.name and "lock" not in path.name]


def test_a_rank_ahead_of_rank_0_is_refused(here: Path) -> None:
    """Someone removed the file of rank 0."""

    def stops(rank: int) -> None:
        def meet(self: Any, batches: int, save: Any = None) -> bool:
            if batches > 32:
                raise ReapError("out of luck")
            return bool(original(self, batches, save))

        original = Meetings.meet
        Meetings.meet = meet  # type: ignore[method-assign]
        run(here)

    assert Forked(here, 2, stops).wait() == [2, 2]
    rank_file(here / "out", 0, 2).unlink()
    forked = Forked(here, 2, lambda _: run(here))
    assert forked.wait() == [2, 2]
    assert re.search("rank 1 was at 32 batches .* rank 0 knows nothing of", forked.said()[0])


def test_ranks_that_differ_in_when_to_end(here: Path) -> None:
    forked = Forked(here, 2, lambda rank: run(here, NEVER if rank else LOOSE))
    assert forked.wait() == [2, 2]
    assert (
        "until_stable is {'ratio': '0.25', 'criterion': 'reap', 'confidence': 0.95"
        in (forked.said()[0])
    )


def test_a_damaged_state_is_refused() -> None:
    class Alone:
        rank = 1

    found = Meetings(LOOSE, tiny_info(), False, Alone())  # type: ignore[arg-type]
    found.passed(3, found.sums.none)
    good = found.state()
    Meetings(LOOSE, tiny_info(), False, Alone()).restore(3, good)  # type: ignore[arg-type]
    for bad in [
        None,
        {},
        good | {"own": {}},
        good | {"met": [2, False]},
        good | {"own": {"1": ""}},
    ]:
        with pytest.raises(ReapError, match="is damaged: begin anew"):
            Meetings(LOOSE, tiny_info(), False, Alone()).restore(3, bad)  # type: ignore[arg-type]


def tiny_info() -> Any:
    from reap.model.identity import describe

    return describe(tiny_model("qwen3_moe", **TINY))
