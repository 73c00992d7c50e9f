"""An output never costs what a command reads, nor what somebody else put there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from reap.errors import ReapError
from reap.files.outputs import PLAN, STATISTICS, check_file, check_folder, format_of


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({}, folder / "model.safetensors", {"format": "pt"})
    return folder


def plan_at(path: Path) -> Path:
    path.write_text(json.dumps({"format": PLAN}))
    return path


def statistics_at(path: Path) -> Path:
    save_file({}, path, {"reap": json.dumps({"format": STATISTICS})})
    return path


def test_what_a_file_is(model: Path, tmp_path: Path) -> None:
    assert format_of(plan_at(tmp_path / "plan")) == PLAN
    assert format_of(statistics_at(tmp_path / "statistics")) == STATISTICS
    (tmp_path / "text").write_text("a line")
    assert {format_of(path) for path in (tmp_path / "text", model, *model.iterdir())} == {None}


def test_only_a_file_of_the_same_kind_is_replaced(model: Path, tmp_path: Path) -> None:
    plan, statistics = plan_at(tmp_path / "plan"), statistics_at(tmp_path / "statistics")
    (tmp_path / "empty").touch()
    for path in (plan, tmp_path / "empty", tmp_path / "new"):
        check_file(path, PLAN, overwrite=True)
    check_file(statistics, STATISTICS, overwrite=True)
    with pytest.raises(ReapError, match="plan exists"):
        check_file(plan, PLAN)
    os.mkfifo(tmp_path / "pipe")
    for path in (statistics, model / "model.safetensors", model / "config.json"):
        with pytest.raises(ReapError, match="not a plan of ours"):
            check_file(path, PLAN, overwrite=True)
    with pytest.raises(ReapError, match="not a regular file"):
        check_file(tmp_path / "pipe", PLAN, overwrite=True)


@pytest.mark.parametrize("name", ["itself", "symlink", "hard link", "folder's symlink"])
def test_a_file_that_is_read_by_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    source = plan_at(tmp_path / "in" / "plan")
    out = tmp_path / name
    if name == "itself":
        out = source
    elif name == "symlink":
        out.symlink_to(source)
    elif name == "hard link":
        out.hardlink_to(source)
    else:
        out.symlink_to(source.parent)
        out /= "plan"
    with pytest.raises(ReapError, match="plan, which is read"):
        check_file(out, PLAN, overwrite=True, inputs=[source])


def test_an_output_in_around_or_linked_with_an_input(model: Path, tmp_path: Path) -> None:
    for out, fault in ((model / "a" / "b", "lies in"), (tmp_path, "holds"), (model, "is")):
        with pytest.raises(ReapError, match=f"output .* {fault} .*model, which is read"):
            check_folder(out, overwrite=True, inputs=[model])
    farm, copy = tmp_path / "farm", tmp_path / "copy"
    for folder in (farm, copy):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    (farm / "model.safetensors").symlink_to(model / "model.safetensors")
    (copy / "model.safetensors").hardlink_to(model / "model.safetensors")
    for out, read in ((model, farm), (farm, model), (copy, model), (model, copy)):
        with pytest.raises(ReapError, match="holds .*model.safetensors, which is read"):
            check_folder(out, overwrite=True, inputs=[read])
    # A link beside the data, to a place that is elsewhere: it would be replaced itself.
    (model / "link").symlink_to(plan_at(tmp_path / "plan"))
    with pytest.raises(ReapError, match="lies in"):
        check_file(model / "link", PLAN, overwrite=True, inputs=[model])


@pytest.mark.parametrize(
    ("files", "foreign"),
    [
        ((), None),
        (("config.json", "model.safetensors", "tokenizer.json", "README.md"), None),
        (("config.json", "model-00001-of-00002.safetensors", "modeling_odd.py"), None),
        (("config.json", "model.safetensors", ".cache/huggingface/x.lock"), None),
        (("thesis.docx", "sub/photo.jpg"), "sub/photo.jpg and 1 more"),
        (("config.json", "package.json"), "config.json and 1 more"),
        (("model.safetensors",), "model.safetensors"),
        (("config.json", "model.safetensors", "stats.safetensors"), "stats.safetensors"),
        (("config.json", "model.safetensors", "sub/config.json"), "sub/config.json"),
        (("config.json", "model.safetensors", "sub/.hidden"), "sub/.hidden"),
    ],
)
def test_only_a_model_is_replaced(
    tmp_path: Path, files: tuple[str, ...], foreign: str | None
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("x")
    if foreign is None:
        check_folder(out, overwrite=True)
        return
    with pytest.raises(ReapError, match=f"{foreign} is not part of a model") as caught:
        check_folder(out, overwrite=True)
    assert "\n" not in str(caught.value) and (out / files[0]).exists()


def test_a_link_to_a_folder_is_not_of_a_model(model: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (model / "photos").symlink_to(tmp_path / "photos")
    with pytest.raises(ReapError, match="photos is not part of a model"):
        check_folder(model, overwrite=True)


def test_shards_of_other_names_are_those_of_the_index(model: Path) -> None:
    (model / "part-a.safetensors").touch()
    with pytest.raises(ReapError, match="part-a"):
        check_folder(model, overwrite=True)
    index = {"weight_map": {"a": "part-a.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    check_folder(model, overwrite=True)
