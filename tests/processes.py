"""Processes as tests start them: forks of the test's own, which have all modules loaded. Ranks, and
programs: what those import is not tested here, but their streams, signals and exit codes are real.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from reap.statistics.stats import Statistics

SECONDS = 60.0  # by when all have to have ended


class Forked:
    """`size` ranks at `work(rank)`. What it returns, or how it ends, is in `said`: of `wait`, or of
    the destructor's kill."""

    def __init__(self, folder: Path, size: int, work: Callable[[int], Any]) -> None:
        self.folder = folder
        port = free_port()
        self.ids = [self._start(rank, size, port, work) for rank in range(size)]

    def _start(self, rank: int, size: int, port: int, work: Callable[[int], Any]) -> int:
        child = os.fork()
        if child:
            return child
        code = 3
        try:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
            values = (rank, size, rank, "127.0.0.1", port)
            os.environ.update({name: str(v) for name, v in zip(names, values, strict=True)})
            torch.set_num_threads(1)
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            said = self.folder / f"said-{rank}"
            said.unlink(missing_ok=True)
            try:
                said.write_text(str(work(rank)))
                code = 0
            except BaseException as error:
                said.write_text("; ".join([str(error), *getattr(error, "__notes__", ())]))
                code = 2 if isinstance(error, ValueError) else 1
                if code == 1:
                    traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.ids[rank], number)

    def wait(self) -> list[int]:
        """Exit codes; a signal's is negative. Who hangs is killed and fails the test."""
        codes: dict[int, int] = {}
        ends = time.monotonic() + SECONDS
        while len(codes) < len(self.ids):
            for child in self.ids:
                if child not in codes:
                    done, status = os.waitpid(child, os.WNOHANG)
                    if done:
                        codes[child] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > ends:
                for child in set(self.ids) - codes.keys():
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                raise AssertionError(f"ranks hang: {codes}, {self.said()}")
            time.sleep(0.005)
        return [codes[child] for child in self.ids]

    def said(self) -> list[str]:
        files = [self.folder / f"said-{rank}" for rank in range(len(self.ids))]
        return [file.read_text() if file.exists() else "" for file in files]


def program(command: Sequence[str | Path], stdout: int, stderr: int) -> int:
    """Starts `python -c CODE ...` or `python -m reap ...`, the rest of the command without python:
    the id of a process that has these files as its streams."""

    def begin() -> int:
        for stream, file in (("stdout", stdout), ("stderr", stderr)):
            number = 1 + (stream == "stderr")
            os.dup2(file, number)
            real = getattr(sys, f"__{stream}__")
            opened = open(number, "w", encoding=real.encoding, errors=real.errors, closefd=False)
            setattr(sys, stream, opened)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or it is told that this is a fork
        return _exit_code(*map(str, command))

    return forked(begin)


def forked(work: Callable[[], int]) -> int:
    """The id of a process that ends with the exit code that `work` returns; 1 for an exception."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)  # a fork has no other, and would wait for them
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = work()
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(code)


def exit_code(child: int) -> int:
    """Of a process of `forked`, when it has ended; a signal's is negative."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _exit_code(how: str, what: str, *arguments: str) -> int:
    sys.argv = [how, *arguments]
    try:
        if how == "-c":
            exec(compile(what, "-c", "exec"), {"__name__": "__main__"})
        else:
            from reap.__main__ import main

            assert (how, what) == ("-m", "reap")
            main()
        code: object = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else 1


def run(command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[Any]:
    """subprocess.run of a command that begins with sys.executable, its output captured."""
    assert command[0] == sys.executable
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = program(command[1:], out.fileno(), err.fileno())
        code = exit_code(child)
        said: list[Any] = []
        for file in (out, err):
            file.seek(0)
            raw = file.read()
            said.append(raw.decode() if options.get("text") else raw)
    done = subprocess.CompletedProcess(list(command), code, *said)
    if options.get("check"):
        done.check_returncode()
    return done


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A fork has no threads but one, and waits for torch's others for ever."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def killed(
    folder: Path, run: Callable[[], Statistics], whole: Statistics, kills: int
) -> Counter[int]:
    """Runs in forks that `kills` SIGKILLs end at random moments, each going on with what those
    before it left in `folder`, until one gets through: it has to find `whole`. How many runs ended
    with how many batches kept."""
    rng, done, left = random.Random(kills), folder / "done", Counter[int]()
    started = time.monotonic()
    while True:
        child = os.fork()
        if child == 0:
            try:
                run().save(done, overwrite=True)
            except BaseException:
                traceback.print_exc(file=sys.__stderr__)
            finally:
                os._exit(0)
        if not left:  # the first, without breaks, says how long one takes
            _, status = os.waitpid(child, 0)
            limit = time.monotonic() - started
            left[-1] += 1
            assert Statistics.load(done) == whole
            continue
        if sum(left.values()) <= kills:
            time.sleep(rng.random() * limit)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kept = folder / "kept"
            left[Statistics.load(kept).data[0]["partial"]["batches"] if kept.exists() else 0] += 1
            continue
        assert Statistics.load(done) == whole and not (folder / "kept").exists()
        if sum(left.values()) > kills:
            return left
        done.unlink()  # faster than the signal: once more


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
