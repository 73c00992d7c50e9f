"""One holder at a time, whatever becomes of holders."""

import os
import signal
import time

import pytest

from reap.errors import ReapError
from reap.files.lock import Lock


def held(path) -> bool:
    try:
        Lock(path).release()
    except ReapError:
        return True
    return False


def child(path):
    """A process that holds the lock until it is killed: its id, once it has it."""
    process = os.fork()
    if process == 0:
        lock = Lock(path)
        (path.parent / "ready").touch()
        time.sleep(60)
        lock.release()
        os._exit(0)
    while not (path.parent / "ready").exists():
        time.sleep(0.01)
    return process


def test_one_holder(tmp_path):
    path = tmp_path / "out"
    lock = Lock(path)
    with pytest.raises(
        ReapError, match=rf"out is being written by another run \(process {os.getpid()}\)"
    ):
        Lock(path)
    lock.release()
    assert not held(path) and not os.listdir(tmp_path)


def test_one_that_is_dropped(tmp_path):
    lock = Lock(tmp_path / "out")
    assert held(tmp_path / "out")
    del lock
    assert not held(tmp_path / "out")


def test_of_a_process_that_is_killed(tmp_path):
    process = child(tmp_path / "out")
    assert held(tmp_path / "out")
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert not held(tmp_path / "out")


def test_a_fork_that_ends_lets_nobody_in(tmp_path):
    lock = Lock(tmp_path / "out")
    process = os.fork()
    if process == 0:
        lock.release()
        os._exit(0)
    os.waitpid(process, 0)
    assert held(tmp_path / "out")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ReapError, match="No such file"):
        Lock(tmp_path / "none" / "out")
