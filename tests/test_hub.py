"""What a user may type for a model."""

from pathlib import Path

import pytest

from reap.errors import ReapError
from reap.files.hub import resolve_model


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "no config.json"),
        ("file", "is a file: give the model's folder"),
        ("missing", "does not exist: give a model folder or a hub id"),
    ],
)
def test_what_is_no_model(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ReapError, match=message):
        resolve_model(tmp_path / name)


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(ReapError, match="org/name is no local .* did not give it: no route$"):
        resolve_model("org/name")


def test_a_folder_beside_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks like a hub id may be a path with a slip."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: 1 / 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "good").mkdir(parents=True)
    with pytest.raises(ReapError, match=r"models/god is no local folder \(models has good\) and"):
        resolve_model("models/god")
