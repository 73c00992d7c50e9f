"""Why there is no GPU in this process, for each backend that needs one."""

import subprocess
import sys

import pytest
import torch

from reap_kernels import gpu

TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040).\nPlease update it"


@pytest.fixture(autouse=True)
def a_torch_for_gpus(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu._refusal.cache_clear()
    yield
    gpu._refusal.cache_clear()


def test_a_driver_that_is_too_old_is_told_by_torch(monkeypatch):
    def init():
        raise RuntimeError(TOO_OLD)

    monkeypatch.setattr(torch.cuda, "init", init)
    assert gpu.missing() == f"no GPU that torch can use: {TOO_OLD.splitlines()[0][:-1]}"


def test_a_gpu_is_no_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.missing() is None


# The GPU is in use if torch says so.
FORKED = """
import multiprocessing, sys, torch
torch.version.cuda = "13.0"
torch.cuda.is_available = lambda: True
torch.cuda.is_initialized = lambda: {used}
import reap_kernels
from reap_kernels import gpu

def child():
    print(gpu.missing(), "|", reap_kernels.backends()["triton"], flush=True)

process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join()
print(gpu.missing())
"""


@pytest.mark.parametrize("used", [True, False])
def test_a_process_that_was_forked_after_a_call(used):
    done = subprocess.run(
        [sys.executable, "-c", FORKED.format(used=used)], capture_output=True, text=True, timeout=60
    )
    child, parent = done.stdout.strip().splitlines()
    reason, triton = child.split(" | ")
    assert parent == "None"
    if used:
        assert reason.startswith("this process was forked from one that had used the GPU")
        assert triton in (reason, "triton cannot be imported")
    else:
        assert reason == "None"
