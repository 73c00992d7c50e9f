"""The command line on the shipped model, as tests call it."""

import json
import re
import sys
from pathlib import Path

from typer.testing import CliRunner

from reap.app.cli import app

MODEL = Path(__file__).parent.parent / "models" / "tiny-qwen3-moe"
# For minutes, up to the name of its output.
CALIBRATE: list[str | Path] = [sys.executable, "-m", "reap", "calibrate", MODEL]
CALIBRATE += ["--data", "stdlib:code", "--out"]


def invoke(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def run_json(*arguments: object) -> dict:
    code, out, err = invoke(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def refused(*arguments: object) -> str:
    """The one line with which a user's mistake is refused."""
    code, out, err = invoke(*arguments)
    assert code == 2, (code, out, err)
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("reap: "), err
    assert "Traceback" not in err
    return lines[0]


def ended(*arguments: object) -> tuple[list[str], str]:
    """Of a run that began: the lines that say so, and the one with which it ended."""
    code, out, err = invoke(*arguments)
    assert code == 2, (code, out, err)
    *said, line = err.strip().splitlines()
    assert all(re.match("reap: (calibrating|pruning|evaluating): ", one) for one in said), err
    assert line.startswith("reap: ") and "Traceback" not in err
    return said, line


def first_session(folder: Path) -> Path:
    """`folder` with what a first session leaves: sources, code and prose statistics, a plan."""
    (folder / "empty").mkdir()
    (folder / "a.txt").write_text("def f(x):\n    return x + 1\n" * 400)
    for name in ("one", "two"):
        calibrate(folder, name)
    invoke("plan", folder / "one.st", "--ratio", 0.5, "--out", folder / "plan.json")
    invoke("plan", folder / "one.st", "--ratio", 0, "--out", folder / "all.json")
    code, _, err = invoke("prune", MODEL, folder / "plan.json", folder / "pruned")
    assert code == 0, err
    return folder


def calibrate(folder: Path, name: str) -> None:
    arguments = (
        "--data",
        folder / "a.txt",
        "--max-tokens",
        512,
        "--seq-len",
        64,
        "--batch-size",
        2,
    )
    code, _, err = invoke(
        "calibrate", MODEL, *arguments, "--domain", name, "--out", f"{folder}/{name}.st"
    )
    assert code == 0, err
