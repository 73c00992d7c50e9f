"""Ranks find each other, agree, miss who ends, and say once what went wrong."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import SECONDS, Forked

from reap.errors import ReapError
from reap.runs import ranks
from reap.runs.ranks import Lost, Ranks, own_device, refuse_ranks, world


@pytest.mark.parametrize("size", [2, 3, 5])
def test_all_agree_and_end(tmp_path: Path, size: int) -> None:
    def work(rank: int) -> str:
        with Ranks() as us:
            us.agree({"seq_len": 16, "sources": [{"spec": "a.txt", "sha256": "12"}]})
            us.agree({"run": 1.5})
            (tmp_path / f"ready-{rank}").touch()
            us.wait_for_all()
            if rank == 0:
                assert all((tmp_path / f"ready-{n}").exists() for n in range(size))
                (tmp_path / "written").touch()
            us.release()
            assert (tmp_path / "written").exists()
            time.sleep(0.05 * rank)  # those that end first are not missed
        return f"{us.rank} of {us.size}, speaks {us.speaks}"

    forked = Forked(tmp_path, size, work)
    assert forked.wait() == [0] * size
    assert forked.said() == [f"{n} of {size}, speaks {n == 0}" for n in range(size)]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"torch": "2.12"}, "torch is 2.12 there, and 2.13 here"),
        ({"seq_len": 17}, "seq_len is 17 there, and 16 here"),
        ({"new": 1}, "new is 1 there, and None here"),
        ({"sources": [{"spec": "a", "sha256": "2"}]}, "sha256 of data 'a' is 2 there, and 1 here"),
    ],
)
def test_a_rank_that_differs(tmp_path: Path, changed: dict[str, Any], reason: str) -> None:
    about = {"torch": "2.13", "seq_len": 16, "sources": [{"spec": "a", "sha256": "1"}]}
    silent = [True] * 3

    def work(rank: int) -> None:
        us = Ranks()
        try:
            with us:
                us.agree(about | (changed if rank == 1 else {}))
        finally:
            (tmp_path / f"speaks-{rank}").write_text(str(us.speaks))

    forked = Forked(tmp_path, 3, work)
    assert forked.wait() == [2, 2, 2]
    assert "rank 1 of 3 (process " in forked.said()[0] and reason in forked.said()[0]
    silent = [(tmp_path / f"speaks-{n}").read_text() == "False" for n in range(3)]
    assert silent == [False, True, True]


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("how", ["error", "kill", "exit", "interrupt"])
def test_a_rank_that_ends_is_missed_at_once(
    tmp_path: Path, monkeypatch: Any, failing: int, how: str
) -> None:
    """Also by those that compute, and by one line of one rank: nobody waits for a time to pass."""
    for seconds in ("_JOIN_SECONDS", "_LAST_WORDS_SECONDS"):
        monkeypatch.setattr(ranks, seconds, 60 * SECONDS)

    def work(rank: int) -> None:
        us = Ranks()
        try:
            with us:
                us.agree({})
                if rank == failing:
                    if how == "error":
                        raise ReapError("the disk is full")
                    if how == "interrupt":
                        raise KeyboardInterrupt
                    time.sleep(0.1)
                    os.kill(os.getpid(), signal.SIGKILL) if how == "kill" else os._exit(0)
                while True:
                    torch.ones(10) + 1
        finally:
            (tmp_path / f"speaks-{rank}").write_text(str(us.speaks))

    forked = Forked(tmp_path, 3, work)
    codes = forked.wait()
    ended = {"error": 2, "kill": -signal.SIGKILL, "exit": 0, "interrupt": 1}[how]
    assert codes == [ended if rank == failing else 2 for rank in range(3)]
    files = [tmp_path / f"speaks-{rank}" for rank in range(3)]
    speaks = [file.exists() and file.read_text() == "True" for file in files]
    silently = how in ("kill", "exit")
    assert speaks == [False, True, False] if silently and not failing else [True, False, False]
    line = forked.said()[1 if silently and not failing else 0]
    if failing:
        assert line.startswith(f"rank {failing} of 3 (process {forked.ids[failing]} on ")
    said = {"error": "the disk is full", "interrupt": "interrupted" if failing else ""}
    assert said.get(how, "has ended without a word") in line


def test_the_first_of_several_errors(tmp_path: Path) -> None:
    """A bad option is wrong in all ranks, and told once."""

    def work(rank: int) -> None:
        us = Ranks()
        try:
            with us:
                raise ReapError("no such option")
        finally:
            (tmp_path / f"speaks-{rank}").write_text(str(us.speaks))

    forked = Forked(tmp_path, 3, work)
    assert forked.wait() == [2, 2, 2]
    assert "no such option" in forked.said()[0]
    assert [(tmp_path / f"speaks-{n}").read_text() for n in range(3)] == ["True", "False", "False"]


def test_a_signal_that_comes_first_keeps_the_reason(tmp_path: Path) -> None:
    """torchrun sends SIGTERM to all when one has ended."""

    def work(rank: int) -> None:
        with Ranks() as us:
            if rank:
                os._exit(3)
            us._handler, handler = None, us._handler  # nobody is woken
            while us.lost is None:
                time.sleep(0.01)
            us._handler = handler
            raise KeyboardInterrupt

    forked = Forked(tmp_path, 2, work)
    assert forked.wait() == [1, 3]
    assert "rank 1 of 2 (process" in forked.said()[0]


def test_a_rank_that_never_comes(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(ranks, "_JOIN_SECONDS", 2.0)

    def work(rank: int) -> None:
        if rank != 1:
            with Ranks():
                pass

    forked = Forked(tmp_path, 3, work)
    codes, (first, _, other) = forked.wait(), forked.said()
    assert codes == [2, 0, 2]
    assert "rank 1 of 3" in first or "did not find the others" in first
    assert other


def test_strangers_are_not_let_in(tmp_path: Path) -> None:
    """Who does not know the word in the store is turned away, whatever it says."""
    import json
    import socket

    def work(rank: int) -> str:
        us = Ranks()
        if rank:
            call = us._call

            def first_others() -> None:
                port, _ = json.loads(us._store.get("rank 0"))
                for words in (
                    b"",
                    b"GET / HTTP/1.0\r\n\r\n",
                    b'{"word": "x", "rank": 1}\n',
                    b"[]\n",
                ):
                    with socket.create_connection(("127.0.0.1", port)) as stranger:
                        stranger.sendall(words)
                call()

            us._call = first_others  # type: ignore[method-assign]
        with us:
            us.agree({"a": 1})
            us.wait_for_all()
            us.release()
        return "done"

    forked = Forked(tmp_path, 2, work)
    assert forked.wait() == [0, 0], forked.said()


@pytest.mark.parametrize(
    ("environment", "found"),
    [({}, (0, 1)), ({"WORLD_SIZE": "4"}, (0, 1)), ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 4))],
)
def test_the_world(monkeypatch: Any, environment: dict[str, str], found: tuple[int, int]) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert world() == found


@pytest.mark.parametrize("values", [("4", "4"), ("x", "2"), ("-1", "2"), ("0", "0"), ("0", "")])
def test_what_is_no_rank(monkeypatch: Any, values: tuple[str, str]) -> None:
    for name, value in zip(("RANK", "WORLD_SIZE"), values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ReapError, match="in the environment name no rank"):
        world()


def test_what_one_process_does(monkeypatch: Any) -> None:
    refuse_ranks("reap prune")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ReapError, match="reap prune runs as one process, .* one of 2"):
        refuse_ranks("reap prune")


def test_devices(monkeypatch: Any) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device("auto") == own_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device("auto") == own_device("cuda") == "cuda:1"
    for device in ("balanced", "sequential", "cuda:0"):
        with pytest.raises(ReapError, match=f"device '{device}' in a run of 2 ranks"):
            own_device(device)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ReapError, match="LOCAL_RANK is 2, and this machine has 2 GPUs"):
        own_device("cuda")
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ReapError, match="LOCAL_RANK is not set"):
        own_device("auto")


def test_lost_is_a_mistake_that_one_line_explains() -> None:
    assert isinstance(Lost("x"), ReapError) and not Lost("x").told
