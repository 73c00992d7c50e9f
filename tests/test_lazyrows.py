"""What stays in a file is read as it was, or not at all."""

import copy
import os
import pickle

import pytest
import torch

from reap.errors import ReapError
from reap.files.safefile import OpenFile
from reap.statistics.lazyrows import LazyRows

ROWS = torch.arange(60, dtype=torch.int32).view(12, 5)


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"head" + ROWS.numpy().tobytes() + b"tail")
    return LazyRows(OpenFile(path), 4, (12, 5), torch.int32)


@pytest.mark.parametrize(
    "some", (slice(None), slice(3, 7), slice(10, 99), slice(5, 5), slice(9, 2))
)
def test_slices(stored, some):
    assert len(stored) == 12
    assert torch.equal(stored[some], ROWS[some] if some != slice(9, 2) else ROWS[:0])
    assert stored[some].dtype == torch.int32


def test_only_neighbours(stored):
    with pytest.raises(ValueError, match="neighbouring"):
        stored[::2]


def test_what_is_read_is_the_readers_own(stored):
    stored[:].fill_(0)
    assert torch.equal(stored[:], ROWS)


def test_copies_share_the_file_and_pickles_have_the_rows(stored):
    assert torch.equal(copy.deepcopy({"a": stored})["a"][:], ROWS)
    assert torch.equal(pickle.loads(pickle.dumps(stored))[2:4], ROWS[2:4])


@pytest.mark.parametrize("change", ("replaced", "removed", "written", "cut"))
def test_the_file_as_it_was(stored, tmp_path, change):
    path = tmp_path / "file"
    if change == "replaced":  # the usual way to write a file anew
        (tmp_path / "new").write_bytes(b"other")
        os.replace(tmp_path / "new", path)
    elif change == "removed":
        path.unlink()
    elif change == "written":
        with open(path, "r+b") as file:
            file.write(b"HEAD")
        os.utime(path, ns=(1, 1))
    else:
        os.truncate(path, 100)
    if change in ("replaced", "removed"):
        assert torch.equal(stored[:], ROWS)
        return
    with pytest.raises(ReapError, match="file changed while it was read"):
        stored[:]


def test_the_file_is_closed_with_its_last_reader(tmp_path):
    (tmp_path / "file").write_bytes(bytes(8))
    before = set(os.listdir("/proc/self/fd"))
    rows = LazyRows(OpenFile(tmp_path / "file"), 0, (2,), torch.int32)
    assert set(os.listdir("/proc/self/fd")) != before
    del rows
    assert set(os.listdir("/proc/self/fd")) == before
