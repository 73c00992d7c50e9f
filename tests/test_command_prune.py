"""`reap prune` and `reap verify`, with names of any bytes."""

import json
import os
import subprocess
import sys

import pytest
from commandline import MODEL


@pytest.mark.sweep
def test_names_that_are_not_utf_8(work, tmp_path):
    """Any bytes but / and 0 are a name on Linux; what cannot be said in UTF-8 is escaped."""
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    for command in (
        ["plan", work / "one.st", "--keep", "8", "--out", folder + b"/plan.json"],
        ["prune", MODEL, folder + b"/plan.json", folder + b"/out", "--json"],
        ["verify", folder + b"/out"],
        ["score", folder + b"/none.st"],
    ):
        done = subprocess.run([sys.executable, "-m", "reap", *command], capture_output=True)
        assert done.returncode == (2 if command[0] == "score" else 0), done.stderr
        assert b"internal error" not in done.stderr
        if "--json" in command:
            assert os.fsencode(json.loads(done.stdout)["out"]) == folder + b"/out"
