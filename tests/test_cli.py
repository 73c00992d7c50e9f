"""The command line as a whole: help, completion, and every mistake a user can make with it."""

import inspect
import os
import re
import subprocess
import sys

import pytest
from commandline import MODEL, invoke, refused

from reap.app.cli import app
from reap.errors import ReapError


@pytest.mark.parametrize("more", ["", ", reap.planning.plan"])
def test_help_and_plans_do_not_import_torch(more):
    """`reap --help` answers at once: the slow imports wait until a command needs them."""
    code = f"import sys, reap.__main__, reap.app.cli{more}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert "calibrate" in invoke("--help")[1]


def test_every_command_is_summed_up_in_a_whole_sentence():
    lines = invoke("--help")[1].split("Commands:\n")[1].splitlines()
    assert len(lines) > 10 and not [line for line in lines if not line.endswith(".")]
    assert not [line for line in lines if line.endswith("...")]


COMMANDS = re.findall(r"^  (\w+)  ", invoke("--help")[1].split("Commands:")[1], re.M)


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_h_is_help(command):
    given = [command] if command else []
    code, out, err = invoke(*given, "-h")
    assert code == 0 and not err and out.startswith("Usage: ")
    assert out == invoke(*given, "--help")[1]


def test_completion_is_offered():
    assert "--install-completion" in invoke("--help")[1]
    # What the options do for the shell that they are called from, which a test's is not.
    environment = {**os.environ, "_REAP_COMPLETE": "source_bash"}
    command = [sys.executable, "-m", "reap"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "_REAP_COMPLETE=complete_bash" in done.stdout


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("reap co", {"compress", "combine"}),
        ("reap plan stats --multi", {"--multiple-of"}),
        ("reap compress --protect", {"--protect-super-experts"}),
        ("reap calibrate model ", set()),  # the shell then offers files
    ],
)
def test_completing_is_quick(typed, offered):
    """As the function that bash is given does it, and without torch, which takes seconds."""
    code = (
        "import sys; sys.argv = ['reap']; from reap.__main__ import main\ntry: main()\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    environment = {**os.environ, **words, "_REAP_COMPLETE": "complete_bash"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stderr.strip() == "False"
    assert set(done.stdout.split()) == offered


# Each line: what the user typed, and what the answer must name. {w} is the work folder.
MISTAKES = {
    "no such folder": ("calibrate {w}/nothing --data {w}/a.txt --out {w}/x.st", "does not exist"),
    "a file as model": ("calibrate {w}/a.txt --data {w}/a.txt --out {w}/x.st", "is a file"),
    "not a model folder": ("calibrate {w}/empty --data {w}/a.txt --out {w}/x.st", "no config.json"),
    "no such data": ("calibrate {m} --data {w}/no.txt --out {w}/x.st", "no.txt"),
    "existing output": ("calibrate {m} --data {w}/a.txt --out {w}/one.st", "--overwrite"),
    "a folder as output": ("calibrate {m} --data {w}/a.txt --out {w} --overwrite", "is a folder"),
    "too long a name": ("calibrate {m} --data {w}/a.txt --out {w}/" + "x" * 300, "too long"),
    "mistakes before a download": ("calibrate no/model --data {w}/no.txt --out {w}/x", "no.txt"),
    "backend before a download": (
        "calibrate no/model --data {w}/a.txt --backend quantum --out {w}/x",
        "quantum",
    ),
    "dtype before a download": ("evaluate no/model --data {w}/a.txt --dtype int3", "bfloat16"),
    "no output folder": ("calibrate {m} --data {w}/a.txt --out {w}/no/x.st", "create the folder"),
    "rows too long": (
        "calibrate {m} --data {w}/a.txt --seq-len 512 --out {w}/x.st",
        "256 positions",
    ),
    "unknown backend": (
        "calibrate {m} --data {w}/a.txt --backend quantum --out {w}/x.st",
        "quantum",
    ),
    "unknown gates": ("calibrate {m} --data {w}/a.txt --gates odd --out {w}/x.st", "renormalized"),
    "unknown dtype": ("calibrate {m} --data {w}/a.txt --dtype int3 --out {w}/x.st", "bfloat16"),
    "not statistics": ("score {w}/a.txt", "a.txt"),
    "no such domain": ("score {w}/one.st --domain two", "there is one"),
    "no statistics": ("score {w}/none.st", "none.st"),
    "unknown criterion": ("score {w}/one.st --criterion best", "weighted_ean"),
    "neither ratio nor keep": ("plan {w}/one.st --out {w}/x.json", "--ratio 0.5 or --keep 8, say"),
    "ratio and keep": ("plan {w}/one.st --ratio 0.5 --keep 8 --out {w}/x.json", "keep"),
    "ratio of all": ("plan {w}/one.st --ratio 1 --out {w}/x.json", "ratio"),
    "fewer than top-k": ("plan {w}/one.st --keep 1 --out {w}/x.json", "picks 2 per token"),
    "verifying what was not pruned": ("verify {m}", "has no reap.json"),
    "verifying it against itself": ("verify {m} --source {m}", "has no reap.json"),
    "a revision of no source": ("verify {w}/pruned --source-revision a", "is of --source"),
    "a revision of no teacher": (
        "evaluate {m} --data {w}/a.txt --teacher-revision a",
        "is of --teacher",
    ),
    "a revision of a file": ("info {w}/one.st --revision a", "a revision is of a hub id"),
    "the domain of all": ("evaluate {m} --data {w}/a.txt --domain total", "sum over domains"),
    "a domain without a name": ("calibrate {m} --data {w}/a.txt --domain= --out {w}/x", "--domain"),
    "not a plan": ("prune {m} {w}/a.txt {w}/x", "a.txt"),
    "statistics twice": (
        "combine {w}/one.st {w}/../{n}/one.st --out {w}/x.st",
        "the same statistics",
    ),
    "data twice": (
        "calibrate {m} --data {w}/a.txt --data {w}/a.txt --out {w}/x.st",
        "give it once",
    ),
    "existing folder": ("prune {m} {w}/plan.json {w}/empty", "--overwrite"),
    "a folder with the plan": ("prune {m} {w}/plan.json {w} --overwrite", "holds {w}/plan.json"),
    "the model as output": ("prune {m} {w}/plan.json {m} --overwrite", "which is read"),
    "data as output": (
        "calibrate {m} --data {w}/a.txt --out {w}/a.txt --overwrite",
        "is {w}/a.txt, which is read",
    ),
    "weights as output": (
        "calibrate {m} --data {w}/a.txt --out {m}/model.safetensors --overwrite",
        "lies in {m}",
    ),
    "statistics as plan": ("plan {w}/one.st --keep 8 --out {w}/one.st --overwrite", "is read"),
    "other statistics as plan": (
        "plan {w}/one.st --keep 8 --out {w}/two.st --overwrite",
        "two.st: it is not a plan of ours",
    ),
    "a sum over its summand": (
        "combine {w}/one.st {w}/two.st --out {w}/two.st --overwrite",
        "is {w}/two.st",
    ),
    "a plan as sum": ("combine {w}/one.st --out {w}/plan.json --overwrite", "not statistics"),
    "nothing to drop": ("prune {m} {w}/all.json {w}/x", "drops no expert"),
    "a demo in its model": ("demo --out {m}/demo", "lies in {m}"),
    "combine with nothing": ("combine {w}/none.st --out {w}/x.st", "none.st"),
    "teacher is missing": ("evaluate {m} --data {w}/a.txt --teacher {w}/none", "none"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line(work, mistake):
    line, named = MISTAKES[mistake]
    before = sorted(path.name for path in work.iterdir())
    arguments = line.format(w=work, m=MODEL, n=work.name).split()
    assert named.format(w=work, m=MODEL) in refused(*arguments)
    assert sorted(path.name for path in work.iterdir()) == before


HUB_IDS = {
    "calibrate org/a --revision v1 --data {w}/a.txt --out {w}/x.st": [("org/a", "v1")],
    "prune org/a {w}/plan.json {w}/x --revision v1": [("org/a", "v1")],
    "group {w}/one.st --method m-smoe --ratio 0.5 --model org/a --revision v1 --out {w}/x": [
        ("org/a", "v1")
    ],
    "evaluate org/a --revision v1 --teacher org/b --teacher-revision v2 --data {w}/a.txt": [
        *(("org/a", "v1"), ("org/b", "v2"))
    ],
    "verify org/a --revision v1 --source org/b --source-revision v2": [
        *(("org/b", "v2"), ("org/a", "v1"))
    ],
    "info org/a --revision v1": [("org/a", "v1")],
}


@pytest.mark.parametrize("line", HUB_IDS)
def test_a_hub_id_may_have_a_revision(work, line, monkeypatch):
    asked = []

    def resolve(model, revision=None):
        asked.append((model, revision))
        if len(asked) == len(HUB_IDS[line]):
            raise ReapError("enough")
        return MODEL

    monkeypatch.setattr("reap.files.hub.resolve_model", resolve)
    assert refused(*line.format(w=work).split()).endswith("enough")
    assert asked == HUB_IDS[line]


def test_every_hub_id_has_a_revision():
    """No command takes a model by its name alone, but for the folder that another wrote."""
    for command in app.registered_commands:
        assert command.callback is not None
        names = inspect.signature(command.callback).parameters
        owns = [name for name in ("teacher", "source") if name in names]
        assert all(f"{name}_revision" in names for name in owns)
        assert "revision" in names or "model" not in names
