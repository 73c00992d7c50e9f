"""A run in pieces has the bits of a run in one, or is refused with the reason."""

from __future__ import annotations

import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from letters import Tokenizer
from processes import killed, one_thread  # noqa: F401
from tiny import tiny_model

from reap.errors import ReapError
from reap.runs.calibration import calibrate
from reap.runs.partial import Partial
from reap.statistics.stats import Statistics
from reap.text.batching import Batches, batches


class Stop(Exception):
    pass


@pytest.fixture(autouse=True)
def every_batch_is_remembered(monkeypatch: Any) -> None:
    monkeypatch.setattr("reap.runs.partial._SHARE", math.inf)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    words = [f"row {number} of several" for number in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in words))
    (tmp_path / "b.txt").write_text("other text of another kind; " * 20)
    return tmp_path


def text(here: Path, **options: Any) -> Batches:
    specs = [str(here / "a.jsonl=2"), str(here / "b.txt")]
    return batches(specs, Tokenizer(), **{"seq_len": 16, "batch_size": 2} | options)


def run(
    here: Path, model: Any, stop_after: int | None = None, seq_len: int = 16, **options: Any
) -> Statistics:
    """As the command does it; Stop behind that many batches, in a forward or in reading text."""
    rows, partial = text(here, seq_len=seq_len), Partial(here / "kept")
    handle = None
    if stop_after is not None:
        calls = iter(range(stop_after + 1))
        layer = model.model.layers[1]

        def stop(*_: Any) -> None:
            if next(calls) == stop_after:  # in the middle of the model: some layers are ahead
                raise Stop("late")

        handle = layer.register_forward_pre_hook(stop)
    try:
        with partial.kept():
            return calibrate(model, rows, partial=partial, **options)
    finally:
        if handle is not None:
            handle.remove()


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("stops", [[0], [1], [7], [3, 0, 5], [1, 1, 1, 1]])
def test_pieces(here: Path, stops: list[int], pairs: bool) -> None:
    """With pairs and all that is optional, and without."""
    model = tiny_model("qwen3_moe")
    asked: dict[str, Any] = {"pairs": pairs, "outputs": pairs, "logits": pairs}
    asked["coalitions"] = 5 if pairs else 0
    whole = calibrate(model, text(here), **asked)
    for number, stop in enumerate(stops):
        with pytest.raises(Stop) as caught:
            run(here, model, stop, **asked)
        done = sum(stops[: number + 1])
        assert (here / "kept").exists() == (done > 0)
        if done:
            kept = Statistics.load(here / "kept")
            (note,) = caught.value.__notes__  # type: ignore[attr-defined]
            assert f"so far, {kept.tokens:,} tokens, is in {here}/kept" in note
            assert kept.data[0]["partial"] == {"batches": done}
    pieces = run(here, model, **asked)
    assert pieces.digest() == whole.digest() and pieces.data == whole.data
    assert pieces.versions == whole.versions
    assert not (here / "kept").exists()


def test_remembering_takes_a_share_of_the_time(here: Path, monkeypatch: Any) -> None:
    """What is remembered a moment later has all domains, and loses a few batches at most."""
    model = tiny_model("qwen3_moe")
    whole = calibrate(model, text(here))
    monkeypatch.setattr("reap.runs.partial._SHARE", 0.2)
    done = 0
    for _ in range(3):
        with pytest.raises(Stop):
            run(here, model, 9)
        before, done = done, Statistics.load(here / "kept").data[0]["partial"]["batches"]
        assert before < done <= before + 9
    assert run(here, model).digest() == whole.digest()


def test_an_unreadable_row_late(here: Path) -> None:
    """The run goes on once the row is mended, for the text before it is the same."""
    rows = (here / "a.jsonl").read_text()
    (here / "a.jsonl").write_text(rows + "\nbad")
    with pytest.raises(ReapError, match="line 21"):
        run(here, tiny_model("qwen3_moe"))
    kept = Statistics.load(here / "kept")
    (here / "a.jsonl").write_text(rows + '\n{"text": "good"}')
    pieces = run(here, tiny_model("qwen3_moe"))
    assert pieces.tokens > kept.tokens
    assert pieces.digest() == calibrate(tiny_model("qwen3_moe"), text(here)).digest()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gates": "renormalized"}, "gates was applied"),
        ({"pairs": True}, "pairs was False"),
        ({"coalitions": 4}, "coalitions was 0"),
        ({"logits": True}, "logits was False"),
        ({"seq_len": 17}, "seq_len was 16, and is 17"),
        ({"deterministic": True}, "run was .*'deterministic': False.*, and is"),
        ("text", "the text of '.*a.jsonl=2' changed"),
        ("less text", "the text of '.*' changed"),
        ("torch", "torch was 1.0, and is"),
        ("model", "another model"),
    ],
)
def test_another_run_is_refused(here: Path, change: Any, reason: str) -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(Stop):
        run(here, model, 9)
    options = change if isinstance(change, dict) else {}
    if change == "text":
        path = here / "a.jsonl"
        path.write_text(path.read_text().replace("row 3", "row 4"))
    elif change == "less text":
        (here / "a.jsonl").write_text('{"text": "one row"}')
    elif change == "torch":
        kept = Statistics.load(here / "kept")
        kept.versions["torch"] = "1.0"
        kept.save(here / "kept", overwrite=True)
    elif change == "model":
        model = tiny_model("mixtral")
    before = (here / "kept").read_bytes()
    with pytest.raises(ReapError, match=reason) as caught:
        run(here, model, **options)
    assert not hasattr(caught.value, "__notes__")
    assert (here / "kept").read_bytes() == before


def test_other_statistics_are_not_taken_up(here: Path) -> None:
    calibrate(tiny_model("qwen3_moe"), text(here)).save(here / "kept")
    with pytest.raises(ReapError, match="is not what a run left that ended early"):
        Partial(here / "kept")


@pytest.mark.parametrize("damage", ["cut", "empty", "newer", "json"])
def test_a_file_that_cannot_be_read(here: Path, damage: str) -> None:
    """It is named, said what to do with, and left as it is."""
    with pytest.raises(Stop):
        run(here, tiny_model("qwen3_moe"), 3)
    kept = here / "kept"
    data = kept.read_bytes()
    kept.write_bytes(
        {
            "cut": data[: len(data) // 2],
            "empty": b"",
            "newer": re.sub(rb'(\\"version\\": ?)\d', rb"\g<1>9", data, count=1),
            "json": data.replace(b"partial", b"par\xfftal"),
        }[damage]
    )
    before = kept.read_bytes()
    assert before != data
    reason = {"newer": "format version 9"}.get(damage, str(kept))
    with pytest.raises(ReapError, match=f"left cannot be read: .*{reason}.* begin anew") as caught:
        Partial(kept)
    assert "\n" not in str(caught.value) and kept.read_bytes() == before


def test_a_clock_that_jumps(here: Path, monkeypatch: Any) -> None:
    """Of the day's time nothing is asked, and a monotonic one that stands still loses nothing."""
    model = tiny_model("qwen3_moe")
    whole = calibrate(model, text(here))
    clock = iter([1e9, 0.0, -1e9, 1e12] * 10_000)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    for still in (1.0, 1e9):
        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr("reap.runs.partial.time.monotonic", lambda now=still: now)
            run(here, model, 5)
    assert Statistics.load(here / "kept").data[0]["partial"] == {"batches": 10}
    assert run(here, model).digest() == whole.digest()


def test_a_fault_that_shows_late_is_not_kept(here: Path, monkeypatch: Any) -> None:
    """A GPU reports a NaN when it is asked. What was asked about before is kept."""
    model = tiny_model("qwen3_moe")
    written_at_every_batch(monkeypatch)
    partial, rows = Partial(here / "kept"), text(here)
    seen = 0

    def progress(_: int) -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            partial._write_at = math.inf
        if seen == 5:
            raise Stop

    snapshot = Statistics.snapshot

    def faulty(stats: Statistics, domain: str) -> Statistics:
        found = snapshot(stats, domain)
        if seen >= 3:
            next(iter(found._parts.values()))._faults += 1
        return found

    monkeypatch.setattr(Statistics, "snapshot", faulty)
    with pytest.raises(Stop), partial.kept():
        calibrate(model, rows, partial=partial, progress=progress)
    assert Statistics.load(here / "kept").data[0]["partial"] == {"batches": 3}


def written_at_every_batch(monkeypatch: Any) -> None:
    monkeypatch.setattr("reap.runs.partial._WRITE_SECONDS", 0.0)
    monkeypatch.setattr("reap.runs.partial._WRITE_SHARE", math.inf)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kills", [3, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_any_moment(here: Path, kills: int, monkeypatch: Any) -> None:
    """kill -9, again and again: the run that gets through has the bits of one without breaks."""
    written_at_every_batch(monkeypatch)
    model = tiny_model("qwen3_moe")
    whole = calibrate(model, text(here))
    killed(here, lambda: run(here, model), whole, kills)
    assert {path.name for path in here.iterdir()} == {"a.jsonl", "b.txt", "done"}


def test_a_run_is_written_while_it_goes_on(here: Path, monkeypatch: Any) -> None:
    written_at_every_batch(monkeypatch)
    seen = []

    def progress(_: int) -> None:
        seen.append(Statistics.load(here / "kept").data[0]["partial"]["batches"])

    partial = Partial(here / "kept")
    with partial.kept():
        calibrate(tiny_model("qwen3_moe"), text(here), partial=partial, progress=progress)
    assert seen == list(range(1, len(seen) + 1)) and not (here / "kept").exists()


def test_a_full_disk_ends_no_run(here: Path, monkeypatch: Any, caplog: Any) -> None:
    written_at_every_batch(monkeypatch)

    def full(*_: Any, **__: Any) -> None:
        raise ReapError("cannot write: disk full")

    monkeypatch.setattr(Statistics, "save", full)
    assert run(here, tiny_model("qwen3_moe")).tokens
    assert "what was measured so far is not kept: cannot write: disk full" in caplog.text


def test_two_runs_on_one_output(here: Path) -> None:
    first = Partial(here / "kept")
    with pytest.raises(ReapError, match=rf"another run \(process {os.getpid()}\)"):
        Partial(here / "kept")
    with first.kept():
        pass
    Partial(here / "kept")


def test_a_disk_that_is_full_hides_no_error(here: Path, monkeypatch: Any) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise ReapError("cannot write: disk full")

    monkeypatch.setattr(Statistics, "save", full)
    with pytest.raises(Stop) as caught:
        run(here, tiny_model("qwen3_moe"), 3)
    assert not hasattr(caught.value, "__notes__")


def test_batches_of_ones_own_are_refused(here: Path) -> None:
    with pytest.raises(ReapError, match="only with batches of reap.batches"):
        calibrate(tiny_model("qwen3_moe"), list(text(here)), partial=Partial(here / "kept"))


def test_what_ran_is_recorded(here: Path) -> None:
    model = tiny_model("qwen3_moe")
    (data,) = calibrate(model, text(here), backend="reference", deterministic=True).data
    expected = {"dtype": "float32", "device": "cpu", "backend": "reference"}
    assert data["run"] == {**expected, "deterministic": True} and data["batch_size"] == 2
    (data,) = calibrate(model, text(here)).data
    assert data["run"]["backend"].startswith("auto of ")
