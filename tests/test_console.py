"""What every command prints: tables, errors, one JSON document, whatever its streams are."""

import inspect
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import typer
from commandline import MODEL, invoke
from typer.testing import CliRunner

from reap.app.cli import app
from reap.app.console import ARGUMENTS, NAMES, print_table, reports_errors


def test_a_table_is_never_cut(monkeypatch, capsys):
    """Not to a terminal's width, which would cost figures, and not of names that look like
    markup."""
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_table("[bold] title", ["layer", "a long heading"], [["[0] name of a layer", "1: 2.345"]])
    printed = capsys.readouterr().out
    assert "…" not in printed
    for text in ("[bold] title", "[0] name of a layer", "a long heading", "1: 2.345"):
        assert text in printed


def test_ascii_terminal(work):
    """What the encoding of stdout does not know is escaped; JSON is ASCII everywhere."""
    (work / "caf\u00e9.txt").write_text("some words " * 50)
    options = ("evaluate", str(MODEL), "--data", str(work / "caf\u00e9.txt"), "--max-tokens", "64")
    for more in ((), ("--json",)):
        result = CliRunner(charset="ascii").invoke(app, [*options, *more])
        assert result.exit_code == 0, result.output
    assert "caf\u00e9" in json.loads(result.stdout)
    result = CliRunner(charset="ascii").invoke(app, ["score", str(work / "one.st"), "--all"])
    assert result.exit_code == 0 and "\\xb1" in result.stdout


def test_closed_pipe_is_quiet(work):
    """`reap score ... | head`: nobody reads on, and that is no error of ours."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "reap", "score", str(work / "one.st"), "--json"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == "" and done.returncode == 1


@pytest.mark.parametrize("stdout", [">/dev/full", ">&-"])
@pytest.mark.parametrize("arguments", ["--version", "plan -h", "info {w}/plan.json"])
def test_a_full_or_closed_stdout_is_no_error_of_ours(work, arguments, stdout):
    """Neither of what a command prints nor of help, which no command prints."""
    line = f"{sys.executable} -m reap {arguments} {stdout}".format(w=work)
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    said = r"reap: cannot write to stdout: (No space left on device|Bad file descriptor)\n"
    assert done.returncode == 2 and re.fullmatch(said, done.stderr)


@pytest.mark.parametrize("stdout", [">/dev/full", ">&-"])
@pytest.mark.parametrize("arguments", ["info {w}/a.txt --json", "plan --json"])
def test_an_error_is_told_where_its_document_cannot_be(work, arguments, stdout):
    line = f"{sys.executable} -m reap {arguments} {stdout}".format(w=work)
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("stderr", ["2>/dev/full", "2>&-"])
def test_nobody_has_to_hear_of_it(work, stderr):
    line = f"{sys.executable} -m reap info {work}/plan.json {stderr} <&-"
    done = subprocess.run(line, shell=True, stdout=subprocess.PIPE)
    assert done.returncode == 0 and b"plan" in done.stdout
    line = f"{sys.executable} -m reap info {work}/a.txt {stderr}"
    done = subprocess.run(line, shell=True, stdout=subprocess.PIPE)
    assert done.returncode == 2 and done.stdout == b""


@pytest.mark.parametrize(
    "error, code, line",
    [
        (PermissionError(13, "Permission denied", "x"), 2, "reap: x: Permission denied"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "--batch-size"),
        (OSError("odd"), 1, "internal error: OSError: odd"),
        (RuntimeError("two\nlines"), 1, "internal error: RuntimeError: two lines"),
    ],
)
def test_exit_codes(error, code, line, capsys):
    @reports_errors
    def command():
        raise error

    with pytest.raises(typer.Exit) as exit:
        command()
    assert exit.value.exit_code == code
    printed = capsys.readouterr().err
    assert line in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("score {w}/none.st --json", "none.st"),
        ("plan {w}/one.st --ratio 1 --out {w}/x.json --json", "ratio"),
        ("plan {w}/one.st --json", "Missing option '--out'"),
        ("scores --json", "No such command 'scores'"),
        ("plan {w}/one.st --keep many --out {w}/x.json --json", "'--keep'"),
        ("score {w}/one.st {w}/two.st --json", "unexpected extra argument"),
        ("score {w}/one.st --js --json", "--js"),
        ("--json", "--json"),
        ("calibrate {w}/none --json", "'--data'"),
    ],
)
def test_json_is_one_document_also_of_errors(work, line, named):
    code, out, err = invoke(*line.format(w=work).split())
    assert code == 2 and err
    document = json.loads(out)
    assert list(document) == ["error"] and named in document["error"]


def test_debug_shows_the_traceback(work):
    result = CliRunner().invoke(app, ["--debug", "score", str(work / "none.st")])
    assert result.exit_code != 0 and result.exception is not None
    assert "none.st" in str(result.exception)


def test_names_stay_on_their_line(work, capsys):
    """Of files and domains, which may hold anything: line ends, escapes, other directions."""
    print_table("title", ["name", "n"], [["a\nb\x1b[31m\u202e", "1"]])
    assert capsys.readouterr().out.splitlines()[-1] == "a b\ufffd[31m\ufffd  1"
    odd = work / "odd\n\x1b[31m.st"
    odd.write_bytes((work / "one.st").read_bytes())
    code, out, _ = invoke("diff", odd, work / "two.st")
    assert code == 0 and "\x1b" not in out
    code, _, err = invoke("info", work / "no\x1b[31m")
    assert code == 2 and "\x1b" not in err and "no\ufffd[31m" in err


def test_what_the_library_advises_is_an_option():
    """Each argument that becomes a flag is the option of a command."""
    commands = [inspect.signature(one.callback) for one in app.registered_commands if one.callback]
    options = {name for command in commands for name in command.parameters}
    assert options >= {*ARGUMENTS.split("|"), *NAMES.split("|")}
