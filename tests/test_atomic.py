import errno
import os

import pytest

from reap.errors import ReapError
from reap.files import atomic
from reap.files.atomic import discard_unfinished, write_file


def while_writing(monkeypatch, act):
    """`act` runs when the first bytes are about to be synced."""
    real = os.fsync

    def fsync(fd):
        monkeypatch.setattr(os, "fsync", real)
        act()
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)


def test_writes_one_file(tmp_path):
    write_file(tmp_path / "a", b"one")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["a"]


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
    with pytest.raises(ReapError, match="a exists: choose another name or pass overwrite=True"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    write_file(path, b"new", overwrite=True)
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("renameat2", [True, False])  # False: the file system does not know it
def test_refuses_a_file_that_appears_while_writing(tmp_path, monkeypatch, renameat2):
    if not renameat2:
        monkeypatch.setattr(atomic, "renameat2", lambda *_: False)
    path = tmp_path / "a"
    while_writing(monkeypatch, lambda: path.write_bytes(b"somebody else's"))
    with pytest.raises(ReapError, match="exists"):
        write_file(path, b"mine")
    assert path.read_bytes() == b"somebody else's"
    assert os.listdir(tmp_path) == ["a"]


def test_no_such_folder(tmp_path):
    with pytest.raises(ReapError, match="cannot write .*/none/a: No such file or directory"):
        write_file(tmp_path / "none" / "a", b"")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ReapError, match="cannot write .*/file/a: Not a directory"):
        write_file(tmp_path / "file" / "a", b"")


def test_file_systems_without_links_modes_or_synced_folders(tmp_path, monkeypatch):
    """Network drives and FAT: what they do not have is not asked of them."""

    def missing(*args, **kwargs):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def fsync(fd):
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    for call in ("link", "chmod", "fchmod"):
        monkeypatch.setattr(os, call, missing)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(atomic, "renameat2", lambda *_: False)
    write_file(tmp_path / "a", b"one")
    assert os.listdir(tmp_path) == ["a"]


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


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    while_writing(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "a", b"half")
    assert os.listdir(tmp_path) == []


def test_what_killed_writers_left_goes(tmp_path):
    left = [".out.0123abcd.part", ".out.br4_x.part"]
    others = [".out.st.0123abcd.part", ".outs.0123abcd.part", "out.part", ".out.0123abcd.lock"]
    for name in (*left, *others):
        (tmp_path / name).touch()
    discard_unfinished(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
