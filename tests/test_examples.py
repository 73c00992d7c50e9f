"""Every example runs, on the model of the repository, and says something."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import MODEL, invoke

from reap import Statistics

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
SMALLER = {"budget_search": ["--max-tokens", "512", "--rounds", "2"]}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), str(MODEL), *SMALLER.get(script.stem, [])])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.strip()


@pytest.mark.slow  # five processes
def test_an_array_job_has_the_bits_of_one_process(tmp_path):
    (tmp_path / "reap").write_text(f'#!/bin/sh\nexec {sys.executable} -m reap "$@"\n')
    (tmp_path / "reap").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "TOKENS": "8192", "PYTHONPATH": str(EXAMPLES.parent)}
    job = [EXAMPLES / "array_job.sh", MODEL, "stdlib:code", tmp_path / "all"]
    for share in ("0", "1", "1", "combine"):  # a share that is done is not done again
        subprocess.run([*job, share, "2"], env=environment, check=True, timeout=120)
    alone = tmp_path / "alone.safetensors"
    words = ("calibrate", MODEL, "--data", "stdlib:code", "--max-tokens", 8192, "--out", alone)
    code, _, err = invoke(*words)
    assert code == 0, err
    both = Statistics.load(tmp_path / "all.safetensors")
    assert both.digest() == Statistics.load(alone).digest()


def test_the_list_has_them_all():
    listed = set(re.findall(r"^\| `(\S+)`", (EXAMPLES / "README.md").read_text(), re.M))
    assert listed == {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")}
