import errno
import os

import pytest

from reap import atomic
from reap.atomic import write_file
from reap.errors import ReapError


def test_writes_bytes_or_what_a_function_writes(tmp_path):
    write_file(tmp_path / "a", b"one")
    write_file(tmp_path / "b", lambda file: file.write(b"two"))
    assert (tmp_path / "a").read_bytes() == b"one"
    assert (tmp_path / "b").read_bytes() == b"two"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_refuses_an_existing_file_and_replaces_it_when_told(tmp_path):
    path = tmp_path / "a"
    write_file(path, b"old")
    with pytest.raises(ReapError, match="a exists: choose another name or pass --overwrite"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    write_file(path, b"new", overwrite=True)
    assert path.read_bytes() == b"new"


def test_refuses_a_file_that_appears_while_writing(tmp_path):
    path = tmp_path / "a"

    def write(file):
        path.write_bytes(b"somebody else's")
        file.write(b"mine")

    with pytest.raises(ReapError, match="exists"):
        write_file(path, write)
    assert path.read_bytes() == b"somebody else's"
    assert os.listdir(tmp_path) == ["a"]


def test_no_such_folder(tmp_path):
    with pytest.raises(ReapError, match="cannot write .*/none/a: No such file or directory"):
        write_file(tmp_path / "none" / "a", b"")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_system_call_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, call, fail)
    with pytest.raises(ReapError, match="cannot write .*: No space left on device"):
        write_file(path, b"new", overwrite=True)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_an_interrupt_leaves_nothing(tmp_path):
    def interrupted(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "a", interrupted)
    assert os.listdir(tmp_path) == []
