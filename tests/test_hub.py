"""What a user may type for a model."""

from pathlib import Path
from typing import Any

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


def test_only_what_is_used_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model("org/name", "v1") == tmp_path
    assert asked.pop("revision") == "v1"
    used = [
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"),
        *("model.safetensors", "model-00001-of-00002.safetensors", "chat_template.jinja"),
        *("model.safetensors.index.json", "merges.txt", "modeling_odd.py", "README.md", "LICENSE"),
    ]
    unused = [
        *("original/model--00001-of-00007.safetensors", "original/params.json", "metal/model.bin"),
        *("consolidated.safetensors", "consolidated.00.pth", "consolidated-00001-of-00002"),
        *("onnx/model.onnx", "onnx/model.onnx_data", "model.onnx_data", "tf_model.h5"),
        *("flax_model.msgpack", "pytorch_model.bin", "pytorch_model.bin.index.json", "q4.gguf"),
        *("checkpoint-100/model.safetensors", "training_args.bin"),
    ]
    assert list(filter_repo_objects([*used, *unused], **asked)) == used


def test_a_revision_is_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ReapError, match="a revision is of a hub id"):
        resolve_model(tmp_path, "main")


def test_a_folder_beside_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks like a hub id may be a path with a slip."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: 1 / 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "good").mkdir(parents=True)
    with pytest.raises(ReapError, match=r"models/god is no local folder \(models has good\) and"):
        resolve_model("models/god")
