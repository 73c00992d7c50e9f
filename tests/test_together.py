"""Several processes have the bits of one, whatever happens to them on the way."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from commandline import MODEL, run_json
from processes import Forked, exit_code, free_port, program
from tiny import tiny_model

from reap.app.arguments import LoadOptions, MeasureOptions
from reap.app.together import Together, together
from reap.errors import ReapError
from reap.runs.calibration import calibrate
from reap.runs.partial import Partial
from reap.runs.rankfiles import PARTIAL
from reap.statistics.stats import Statistics
from reap.text.batching import Batches, batches

MODEL_HERE = tiny_model("qwen3_moe")


class Tokenizer:
    eos_token_id = pad_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 64 for letter in text]}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: Any) -> Path:
    monkeypatch.setattr("reap.runs.partial._SHARE", math.inf)
    monkeypatch.setattr("reap.runs.partial._WRITE_SECONDS", 0.0)
    monkeypatch.setattr("reap.runs.partial._WRITE_SHARE", math.inf)
    words = [f"row {number} of several" for number in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in words))
    (tmp_path / "b.txt").write_text("other text of another kind; " * 20)
    return tmp_path


def text(here: Path, us: Together | None = None) -> Batches:
    specs = [str(here / "a.jsonl=2"), str(here / "b.txt")]
    share = None if us is None else us.share
    return batches(specs, Tokenizer(), seq_len=16, batch_size=2, shard=share)


def run(here: Path, pairs: bool = False, model: Any = MODEL_HERE, late: Any = None) -> None:
    """As the command does it, of a model that is there."""
    with together(None) as us:
        partial = Partial(us.partial_file(here / "out"))
        rows = text(here, us)
        us.check_same(
            MODEL, rows, MeasureOptions(pairs=pairs), LoadOptions(device="cpu"), here / "out"
        )
        us.check_same_run(model, MeasureOptions())
        with partial.kept():
            stats = calibrate(model, rows, pairs=pairs, partial=partial, progress=late)
            total = us.sum_of_all(stats, partial, rows, here / "out")
            if us.writes:
                total.save(here / "out", overwrite=True)
            us.release()


@pytest.mark.parametrize(
    ("pairs", "size"),
    [
        (True, 3),
        (False, 2),
        *(
            pytest.param(pairs, size, marks=pytest.mark.slow)
            for pairs, size in [(True, 2), (False, 3), (True, 40), (False, 40)]
        ),
    ],
)
def test_ranks_are_one(here: Path, size: int, pairs: bool) -> None:
    """Also where some have no batch at all."""
    calibrate(MODEL_HERE, text(here), pairs=pairs).save(here / "whole")
    forked = Forked(here, size, lambda _: run(here, pairs))
    assert forked.wait() == [0] * size, forked.said()
    assert (here / "out").read_bytes() == (here / "whole").read_bytes()
    assert not [path for path in here.iterdir() if "partial" in path.name]


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_ranks_killed_at_any_moment(here: Path, kills: int, monkeypatch: Any) -> None:
    """One of them, or all, again and again: those that get through have the bits of one process."""
    monkeypatch.setattr("reap.runs.ranks._JOIN_SECONDS", 5.0)  # no torchrun ends who waits
    calibrate(MODEL_HERE, text(here)).save(here / "whole")
    started = time.monotonic()
    assert Forked(here, 2, lambda _: run(here)).wait() == [0, 0]
    limit, rng, killed = time.monotonic() - started, random.Random(kills), 0
    for _ in range(kills + 3):
        (here / "out").unlink(missing_ok=True)
        forked = Forked(here, 2, lambda _: run(here))
        if killed < kills:
            time.sleep(rng.random() * limit)
            for rank in rng.choice([(0,), (1,), (0, 1)]):
                forked.kill(rank)
                killed += 1
        codes = forked.wait()
        if codes == [0, 0]:
            assert (here / "out").read_bytes() == (here / "whole").read_bytes()
            if killed >= kills:
                break
    assert killed >= kills and codes == [0, 0], forked.said()
    assert not [path for path in here.iterdir() if PARTIAL in path.name and "lock" not in path.name]


def test_a_rank_that_is_through_keeps_what_it_has(here: Path) -> None:
    """When another is lost, for the same command to go on from."""
    whole, other = len(list(text(here))), here / f"out.rank-1-of-2{PARTIAL}"

    def through() -> bool:
        try:
            return Statistics.load(other).data[0]["partial"]["batches"] == whole
        except ReapError:  # it is being replaced
            return False

    def stops(rank: int) -> None:
        def late(tokens: int) -> None:
            if rank == 0 and other.exists():
                while not through():
                    time.sleep(0.01)
                raise ReapError("out of luck")

        run(here, late=late)

    forked = Forked(here, 2, stops)
    assert forked.wait() == [2, 2]
    assert "out of luck" in forked.said()[0]
    (data,) = Statistics.load(other).data
    total = text(here)
    assert data["partial"]["batches"] == len(list(total)) and data["tokens"] == total.tokens
    ran = []
    forked = Forked(here, 2, lambda rank: run(here, late=lambda tokens: ran.append(tokens)))
    assert forked.wait() == [0, 0]
    assert Statistics.load(here / "out") == calibrate(MODEL_HERE, text(here))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("measuring", "pairs is True there, and False here"),
        ("dtype", "dtype is float32 there, and auto here"),
        ("output", "the output is other there, and out here"),
        ("versions", "the version of reap-saliency is 1.0 there, and"),
        ("model", "the hash of the model's weights is "),
        ("text", "the hash of the text is "),
    ],
)
def test_what_differs_is_refused_before_work(here: Path, change: str, reason: str) -> None:
    def differs(rank: int) -> None:
        from reap import versions
        from reap.model import identity

        measuring, loading, out = MeasureOptions(), LoadOptions(), Path("out")
        with together(None) as us:
            rows = text(here, us)
            if rank and change == "measuring":
                measuring = replace(measuring, pairs=True)
            if rank and change == "dtype":
                loading = replace(loading, dtype="float32")
            if rank and change == "output":
                out = Path("other")
            if rank and change == "versions":
                told = dict.fromkeys(["reap-saliency", "torch"], "1.0")
                mock.patch.object(versions, "installed", lambda *_: told).start()
            if rank and change == "model":
                mock.patch.object(identity, "weights_fingerprint", lambda _: "0").start()
            if rank and change == "text":
                mock.patch.object(
                    Tokenizer, "__call__", lambda *_, **__: {"input_ids": [1] * 9}
                ).start()
            us.check_same(MODEL, rows, measuring, loading, out)

    forked = Forked(here, 2, differs)
    assert forked.wait() == [2, 2]
    assert "rank 1 of 2 (process" in forked.said()[0] and reason in forked.said()[0]


def test_a_shard_is_for_one_process(monkeypatch: Any) -> None:
    with together("1/4") as us:
        assert us.said() == "shard 1/4" and us.writes and us.device("cuda:1") == "cuda:1"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ReapError, match="--shard 1/4 in a run of 2 ranks"):
        with together("1/4"):
            pass


@pytest.mark.long
def test_torchrun(work: Path, tmp_path: Path) -> None:
    """The command line itself: the same file as of one process, one voice, no process left."""
    options = ["--data", work / "a.txt", "--seq-len", 64, "--max-tokens", 2048, "--out"]
    run_json("calibrate", MODEL, *options, tmp_path / "one.st")
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "reap"]
    command = [*start, "calibrate", MODEL, *options, tmp_path / "two.st", "--json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == 2048
    assert done.stderr.count("reap: ") == 1 and ", 2 ranks, about 2,048 tokens" in done.stderr
    assert (tmp_path / "two.st").read_bytes() == (tmp_path / "one.st").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.st", "two.st"]


def test_one_rank_says_why_all_end(work: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The command line of two ranks, in forks."""
    (tmp_path / "two.st").write_bytes((work / "one.st").read_bytes())
    options = ["--data", work / "a.txt", "--out", tmp_path / "two.st", "--json"]
    place = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = []
    for rank in range(2):
        for name, value in (place | {"RANK": rank, "LOCAL_RANK": rank}).items():
            monkeypatch.setenv(name, str(value))
        with open(tmp_path / f"out-{rank}", "w") as out, open(tmp_path / f"err-{rank}", "w") as err:
            command = ["-m", "reap", "calibrate", str(MODEL), *map(str, options)]
            ranks.append(program(command, out.fileno(), err.fileno()))
    assert all(map(exit_code, ranks))
    printed, told = (
        "".join(path.read_text() for path in tmp_path.glob(f"{stream}-*"))
        for stream in ("out", "err")
    )
    assert "two.st exists" in json.loads(printed)["error"] and told.count("reap: ") == 1
