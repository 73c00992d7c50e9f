"""What every test gets: fresh memory that is poisoned, and a skip where a GPU is missing. What test
modules compile starts with the session; programs that they start heed signals. The header says
which releases run. Long tests begin first."""

import contextlib
import functools
import signal
import threading

import pytest
import torch

from reap.versions import installed

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


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """What a first session on the command line leaves."""
    from commandline import first_session

    return first_session(tmp_path_factory.mktemp("work"))


def pytest_report_header():
    found = installed("transformers", "torch")
    return ", ".join(f"{package} {release}" for package, release in found.items())


def pytest_configure():
    """A process that was started to ignore signals (by nohup, in the background of a script) hands
    that on to the programs that it starts; a handler that does nothing is not handed on."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu") is not None:  # keywords have the names of folders, too
            item.add_marker(skip)


def to_prepare(items):
    """Modules of the items that will run and are not for a GPU: those compare with no compiler's
    work, and must not wait for it."""
    return list(
        dict.fromkeys(
            item.module
            for item in items
            if hasattr(item, "module") and item.get_closest_marker("gpu") is None
        )
    )


def pytest_collection_finish(session):
    """Calls prepare() of each test module that has one, in a thread of its own, and of the first of
    several processes alone: compilers run beside the tests that do not wait for them. One that
    fails here fails again in the test that needs it."""
    modules = to_prepare(session.items)
    if getattr(session.config, "workerinput", {"workerid": "gw0"})["workerid"] != "gw0":
        return

    def work():
        for module in modules:
            if hasattr(module, "prepare"):
                with contextlib.suppress(Exception):
                    module.prepare()

    if not session.config.option.collectonly:
        threading.Thread(target=work, daemon=True).start()
