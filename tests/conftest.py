"""What every test gets: fresh memory that is poisoned, and a skip where a GPU is missing. What test
modules compile starts with the session."""

import contextlib
import functools
import threading

import pytest
import torch

_FLOATS = {torch.bfloat16, torch.float16, torch.float32, torch.float64}
_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def _poisoned(allocate):
    """`allocate`, but its memory holds NaN or the largest integer, so that reading it shows."""

    @functools.wraps(allocate)
    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if type(tensor) is torch.Tensor and tensor.device.type in ("cpu", "cuda"):
            if tensor.dtype in _FLOATS:
                tensor.detach().fill_(torch.nan)
            elif tensor.dtype in _INTEGERS:
                tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return wrapper


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish(session):
    """Calls prepare() of each test module that has one, in a thread of its own: compilers run on a
    core that most tests leave idle. One that fails here fails again in the test that needs it."""
    modules = dict.fromkeys(item.module for item in session.items if hasattr(item, "module"))

    def work():
        for module in modules:
            if hasattr(module, "prepare"):
                with contextlib.suppress(Exception):
                    module.prepare()

    if not session.config.option.collectonly:
        threading.Thread(target=work, daemon=True).start()
