"""Whatever fails: the output is the old folder or the new one, whole, and nothing else is left."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from folders import saved, some_plan
from processes import exit_code, forked

from reap.checkpoint import pruning
from reap.checkpoint.pruning import prune
from reap.errors import ReapError
from reap.files import atomic, publish
from reap.planning.plan import Plan

CALLS = ("write", "copy_file_range", "fsync", "rename", "mkdir")
ENDED = 17
DAMAGES = {
    "zeros": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "a bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "one more byte": lambda data: data + b"x",
}
OLD = {"config.json": b"{}", "model.safetensors": b"old"}


def state(folder: Path) -> dict[str, bytes] | None:
    """Every file in a folder but those that name the command, or None when there is none."""
    if not folder.exists():
        return None
    files = (
        p for p in folder.rglob("*") if p.is_file() and p.name not in ("reap.json", "README.md")
    )
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan, dict[str, bytes]]:
    """A base folder, a plan, and the whole result."""
    root = tmp_path_factory.mktemp("job")
    saved(root / "base", num_hidden_layers=2, shards=True)
    (root / "base" / "tokenizer.json").write_bytes(b"{}")
    plan = some_plan(root / "base")
    prune(root / "base", plan, root / "whole")
    whole = state(root / "whole")
    assert whole is not None
    return root / "base", plan, whole


def put_old(out: Path, old: dict[str, bytes] | None) -> None:
    shutil.rmtree(out, ignore_errors=True)
    if old is not None:
        out.mkdir()
        for name, data in old.items():
            (out / name).write_bytes(data)


def failing(monkeypatch: pytest.MonkeyPatch, at: int, fail: Callable[[], None]) -> list[str]:
    """Makes the `at`-th call that writes, syncs or renames fail; returns the calls seen."""
    seen: list[str] = []

    def counted(name: str, real: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            seen.append(name)
            if len(seen) == at:
                fail()
            return real(*args, **kwargs)

        return call

    for check in ("check_same_model", "_check_shapes"):  # slow, and they write nothing
        monkeypatch.setattr(pruning, check, lambda *_: None)
    for name in CALLS:
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    monkeypatch.setattr(atomic, "renameat2", counted("renameat2", atomic.renameat2))
    return seen


def raising(code: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.sweep
@pytest.mark.parametrize("old", [None, OLD], ids=["new", "overwrite"])
@pytest.mark.parametrize(
    "code",
    [
        pytest.param(errno.ENOSPC, id="full"),
        pytest.param(errno.EIO, id="io", marks=pytest.mark.slow),
        pytest.param(None, id="interrupt"),
    ],
)
def test_every_failing_call_leaves_the_old_state(
    job: tuple[Path, Plan, dict[str, bytes]],
    tmp_path: Path,
    old: dict[str, bytes] | None,
    code: int | None,
) -> None:
    base, plan, whole = job
    out = tmp_path / "out"
    put_old(out, old)

    def interrupt() -> None:
        raise KeyboardInterrupt

    at, failed, names = 0, True, set()
    while failed:
        at += 1
        expected = old
        with pytest.MonkeyPatch.context() as patch:
            seen = failing(patch, at, interrupt if code is None else raising(code))
            try:
                prune(base, plan, out, overwrite=old is not None)
                expected = whole  # nothing failed, or what failed did not matter
            except (ReapError, KeyboardInterrupt) as error:
                assert "\n" not in str(error)
                names.add(seen[at - 1])
            failed = len(seen) >= at
        assert [p.name for p in tmp_path.iterdir() if p.name != "out"] == [], f"call {at} of {seen}"
        assert state(out) == expected, f"call {at} of {seen}"
        if failed and expected == whole:
            put_old(out, old)
    assert names >= {"write", "copy_file_range", "fsync", "renameat2", "mkdir"}


@pytest.mark.sweep
@pytest.mark.parametrize(
    "old", [pytest.param(None, marks=pytest.mark.slow, id="new"), pytest.param(OLD, id="overwrite")]
)
def test_killed_at_every_call(
    job: tuple[Path, Plan, dict[str, bytes]], tmp_path: Path, old: dict[str, bytes] | None
) -> None:
    base, plan, whole = job
    out = tmp_path / "out"

    def killed(at: int) -> int:
        failing(pytest.MonkeyPatch(), at, lambda: os._exit(ENDED))
        prune(base, plan, out, overwrite=old is not None)
        return 0

    at, ended = 0, ENDED
    while ended:
        at += 1
        put_old(out, old)
        ended = exit_code(forked(lambda at=at: killed(at)))  # type: ignore[misc]
        assert ended in (0, ENDED), f"call {at} ended with {ended}"
        found = state(out)
        assert found in ((whole,) if ended == 0 else (old, whole)), f"killed at call {at}"
    assert at > 30
    assert [p.name for p in tmp_path.iterdir()] == ["out"], (
        "the last run cleans up after the killed ones"
    )


def test_stale_folders_go_and_living_ones_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / ".out.reap-0123abcd").mkdir()
    (tmp_path / ".out.reap-not-ours").mkdir()
    # Two runs at once: the second leaves the first one's folder alone and wins; the first may not
    # replace what has appeared meanwhile.
    with pytest.raises(FileExistsError), publish.staged(out, overwrite=False) as first:
        with publish.staged(out, overwrite=False) as second:
            assert first.exists() and not (tmp_path / ".out.reap-0123abcd").exists()
            (second / "file").write_text("second")
    assert (out / "file").read_text() == "second"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.reap-not-ours", "out"]


def test_without_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two names cannot be exchanged the old folder is moved aside, and back on failure."""
    monkeypatch.setattr(atomic, "renameat2", lambda *_: False)
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("old")
    with publish.staged(out, overwrite=True) as stage:
        (stage / "file").write_text("new")
    assert (out / "file").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(FileExistsError), publish.staged(out, overwrite=False):
        pass
    # Killed between the two renames: only the aside folder holds the old one.
    os.rename(out, tmp_path / ".out.reap-aside")
    with pytest.raises(RuntimeError), publish.staged(out, overwrite=True):
        raise RuntimeError
    assert (out / "file").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_while_the_old_folder_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", os.unlink
    put_old(out, {"a": b"old", "b": b"old"})

    def unlink(*args: object, **kwargs: object) -> None:
        monkeypatch.setattr(os, "unlink", real)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), publish.staged(out, overwrite=True) as stage:
        (stage / "a").write_bytes(b"new")
        monkeypatch.setattr(os, "unlink", unlink)
    assert state(out) == {"a": b"new"} and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_missing_parents_are_made_and_taken_away_again(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with pytest.raises(RuntimeError), publish.staged(out, overwrite=False):
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with publish.staged(out, overwrite=False):
        pass
    assert out.is_dir()


def test_a_failing_verify_leaves_nothing(tmp_path: Path) -> None:
    def verify(stage: Path) -> None:
        raise ReapError(f"{stage} is wrong")

    with (
        pytest.raises(ReapError, match="is wrong"),
        publish.staged(tmp_path / "out", overwrite=False, verify=verify),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_written_shard_that_is_wrong_is_caught(
    job: tuple[Path, Plan, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One expert's rows swapped for another name: the headers no longer say what was meant."""
    from reap.checkpoint import writing

    base, plan, _ = job
    real = writing.encode_header
    monkeypatch.setattr(
        writing,
        "encode_header",
        lambda tensors, meta: real({f"{n}x": t for n, t in tensors.items()}, meta),
    )
    with pytest.raises(ReapError, match="verification failed|does not hold"):
        prune(base, plan, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("victim", ["a shard", "tokenizer.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_bytes_that_are_not_the_original_s_are_caught(
    job: tuple[Path, Plan, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    victim: str,
    damage: str,
) -> None:
    """The headers are fine: a network drive lost a block, or a disk wrote what it was not given."""
    base, plan, _ = job
    real = os.fsync
    done: list[Path] = []
    (tmp_path / "outs").mkdir()

    def fsync(fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if not done and path.name.endswith(".safetensors" if victim == "a shard" else victim):
            done.append(path)
            path.write_bytes(DAMAGES[damage](path.read_bytes()))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    place = "after byte" if damage == "one more byte" else "from byte"
    with pytest.raises(ReapError, match=f"verification failed: .* {place}"):
        prune(base, plan, tmp_path / "outs" / "out")
    assert not list((tmp_path / "outs").iterdir())


def test_verification_is_reported_recorded_and_can_be_left_out(
    job: tuple[Path, Plan, dict[str, bytes]], tmp_path: Path
) -> None:
    base, plan, _ = job
    report = prune(base, plan, tmp_path / "out")
    assert report.verify_seconds and "read back and the same" in str(report)
    record = json.loads((tmp_path / "out" / "reap.json").read_text())
    names = {str(p.relative_to(report.out)) for p in report.out.rglob("*")} - {"reap.json"}
    assert set(record["files"]) == names
    for name, about in record["files"].items():
        data = (report.out / name).read_bytes()
        assert about == {"bytes": len(data), "crc32": zlib.crc32(data)}
    report = prune(base, plan, tmp_path / "quick", verify=False)
    assert report.verify_seconds is None and "not verified" in str(report)
    record = json.loads((tmp_path / "quick" / "reap.json").read_text())
    assert all(set(about) == {"bytes"} for about in record["files"].values())


@pytest.mark.parametrize("victim", ["last shard", "tokenizer.json"])
def test_a_source_that_changes_meanwhile_is_noticed(
    job: tuple[Path, Plan, dict[str, bytes]], tmp_path: Path, victim: str
) -> None:
    """Also when the size stays and the file was not opened yet when it changed."""
    base = tmp_path / "base"
    shutil.copytree(job[0], base)
    file = sorted(base.glob("*.safetensors"))[-1] if victim == "last shard" else base / victim
    todo = [file.read_bytes()]

    def disturb(n: int) -> None:
        if todo and (victim == "last shard" or n == len(todo[0])):
            raw = todo.pop()
            file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))

    with pytest.raises(ReapError, match=f"{file.name} changed while it was read"):
        prune(base, job[1], tmp_path / "out", progress=disturb)
    assert not todo and [p.name for p in tmp_path.iterdir()] == ["base"]


@pytest.mark.sweep
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_a_signal_at_any_time(
    job: tuple[Path, Plan, dict[str, bytes]], tmp_path: Path, number: signal.Signals
) -> None:
    base, plan, whole = job
    out = tmp_path / "out"
    reader, writer = os.pipe()

    def slow(n: int) -> None:
        os.write(writer, b"x")
        time.sleep(0.05)

    def slowly() -> int:
        prune(base, plan, out, progress=slow)
        return 0

    child = forked(slowly)
    os.close(writer)
    assert os.read(reader, 1)
    os.close(reader)
    os.kill(child, number)
    assert exit_code(child) != 0
    assert not out.exists()
    hidden = [p.name for p in tmp_path.iterdir()]
    assert len(hidden) == (1 if number == signal.SIGKILL else 0)
    assert all(name.startswith(".out.reap-") for name in hidden)
    prune(base, plan, out)
    assert state(out) == whole and [p.name for p in tmp_path.iterdir()] == ["out"]
