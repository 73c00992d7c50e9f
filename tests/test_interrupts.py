"""Ctrl-C and other signals, at the moments that a user chooses."""

import contextlib
import os
import pty
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commandline import CALIBRATE
from processes import exit_code, program


def test_a_bar_on_a_terminal_until_ctrl_c(tmp_path):
    """A pseudo-terminal as stderr: after two seconds there is a bar with tokens per second. An
    interrupt, inside the loop then, leaves a line and nothing else."""
    leader, follower = pty.openpty()
    process = program([*CALIBRATE, tmp_path / "x.st"][1:], stdout=follower, stderr=follower)
    os.close(follower)
    seen = b""
    try:
        deadline = time.monotonic() + 180
        while b"tokens/s" not in seen and time.monotonic() < deadline:
            seen += os.read(leader, 4096)
        os.kill(process, signal.SIGINT)
        with contextlib.suppress(OSError):  # how a terminal ends
            while time.monotonic() < deadline:
                seen += os.read(leader, 4096)
        assert exit_code(process) == -signal.SIGINT
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(process, signal.SIGKILL)
            exit_code(process)
        os.close(leader)
    assert b"tokens/s" in seen and b"reap: interrupted" in seen
    assert [path.name for path in tmp_path.iterdir()] == ["x.st.partial.safetensors"]
    assert b"x.st.partial.safetensors: the same command goes on from there" in seen


def imports_torch(process: int) -> bool:
    return "libtorch" in Path(f"/proc/{process}/maps").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_torch_is_imported_leaves_nothing(tmp_path, number):
    process = subprocess.Popen([*CALIBRATE, tmp_path / "x.st"], stderr=subprocess.PIPE, text=True)
    while not imports_torch(process.pid):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == -number
    assert err.strip().startswith("reap: interrupted") and len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_a_loop_of_the_shell(tmp_path):
    """A shell goes on after an exit code, whichever, but not after a signal's death."""
    command = " ".join(map(str, [*CALIBRATE, tmp_path / "x.st"]))
    loop = f"for i in 1 2; do echo run $i; {command}; done; echo end"
    process = subprocess.Popen(
        ["bash", "-c", loop],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not any(imports_torch(int(child)) for child in children.read_text().split()):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out == "run 1\n" and err.count("reap: interrupted") == 1
