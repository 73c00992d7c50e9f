"""What the documentation shows is run: every command and every snippet, a page in one folder, on
the small model in the place of the one that is named.

Blocks marked `sh` and `python` are run in their order. Lines of other programs are not. The one
change: `--max-tokens` and what is generated are lowered, since any text will do.
"""

import glob
import json
import re
import shlex
import shutil
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
from commandline import MODEL, invoke

ROOT = Path(__file__).parent.parent
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODELS = ("MODEL", "Qwen/Qwen3-30B-A3B")
MOST_TOKENS = 2048
SURE_TOKENS = 8192  # what --until-stable needs to say anything
MOST = {"--max-tokens": MOST_TOKENS, "--generate": 4, "--new-tokens": 16}
# First words of lines that are not ours to run here.
OTHERS = {"pip", "make", "vllm", "torchrun", "sbatch", "srun", "git", "cd", "python"}


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks that are to be run."""
    found = BLOCK.findall(page.read_text())
    return [(language, text) for language, text in found if language in ("sh", "python")]


@pytest.fixture(scope="module")
def statistics(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("docs") / "stats.safetensors"
    code, _, err = invoke(
        *("calibrate", MODEL, "--data", "stdlib:code", "--max-tokens", MOST_TOKENS, "--out", out)
    )
    assert code == 0, err
    return out


def furnish(folder: Path, page: Path, statistics: Path) -> None:
    """What a page takes for granted: models, conversations, and statistics unless it makes them."""
    for name in MODELS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(MODEL)
    for name in ("chat.jsonl", "heldout.jsonl"):
        rows = [
            {"text": f"{name} {row} <think>a list of {row}</think> return [{row}]\n" * 20}
            for row in range(8)
        ]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if "--out stats.safetensors" not in page.read_text():
        shutil.copy(statistics, folder / "stats.safetensors")


def words(line: str) -> list[str]:
    """The arguments of a command as a shell would give them, with fewer tokens and texts."""
    split = shlex.split(line, comments=True)
    quoted = set(re.findall(r"'([^']*)'", line))
    most = MOST | {"--max-tokens": SURE_TOKENS} if "--until-stable" in split else MOST
    for place, word in enumerate(split):
        if word in most:
            split[place + 1] = str(min(most[word], int(split[place + 1])))
    return [
        name
        for word in split
        for name in (
            sorted(glob.glob(word)) if glob.has_magic(word) and word not in quoted else [word]
        )
    ]


def run_shell(text: str) -> int:
    """The number of our commands in it, all of which ran."""
    ran = 0
    for line in text.replace("\\\n", " ").splitlines():
        first, *rest = words(line) or [""]
        if first == "reap":
            code, _, err = invoke(*rest)
            assert code == 0, f"{line}\n{err}"
            ran += 1
        else:
            assert first in OTHERS | {""}, f"neither ours nor known: {line}"
    return ran


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_runs(page, tmp_path, monkeypatch, statistics):
    furnish(tmp_path, page, statistics)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for language, text in blocks(page):
        if language == "sh":
            run_shell(text)
        else:
            exec(compile(text, f"{page.name}: {text.splitlines()[0]}", "exec"), names)


def test_a_wrong_command_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="no-such"):
        run_shell("reap info no-such-file\n")
    with pytest.raises(AssertionError, match="neither ours"):
        run_shell("raep info x\n")


def test_every_page_is_in_the_site():
    listed = set(re.findall(r"(\S+\.md)", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_every_public_name_has_its_place():
    import reap

    shown = set(re.findall(r"^::: reap\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.M))
    unshown = {"CRITERIA", "LayerInfo", "ModelInfo", "Mtp", "ReapError", "__version__"}
    assert shown == set(reap.__all__) - unshown


def test_every_dependency_has_its_licence():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    own = {"test", "lint", "docs"}  # not for users
    needed = [*project["dependencies"], *(n for name in extras.keys() - own for n in extras[name])]
    names = {re.split(r"[^\w-]", each)[0] for each in needed}
    page = (ROOT / "docs" / "licences.md").read_text()
    assert set(re.findall(r"^\| ([\w-]+) \|", page, re.M)) - {"package"} == names


def test_licences_are_what_the_pinned_versions_state():
    page = (ROOT / "docs" / "licences.md").read_text()
    pins = (ROOT / "constraints.txt").read_text()
    stated = 0
    for name, *cells in re.findall(r"^\| ([\w-]+) \|(.*)\|$", page, re.M):
        try:
            about = metadata(name)
        except PackageNotFoundError:
            continue
        pinned = f"{name}=={about['Version'].partition('+')[0]}" in pins
        if pinned and (expression := about["License-Expression"]):
            assert f" {expression} " in cells[0], name
            stated += 1
    assert stated
