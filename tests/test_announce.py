"""What Triton compiles, for what it does not compile again, and that it says so."""

import logging
from types import SimpleNamespace

import cases
import host_time
import pytest
import torch

from reap.statistics.layerstats import LayerStatistics
from reap_kernels.contract import make_call
from reap_kernels.triton import configs, launch, replay, statistics

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="of compiled kernels")

FEW, MANY = (1, 2, 3, 16, 33, 64), (7, 8, 100, 129, 1000, 3000, 5000)
LAYER = cases.Case("", K=3, E=4, H=64, I=32, bias=True)


@pytest.fixture
def compiled(monkeypatch):
    """Runs layers of so many tokens; the kernels that a new process would compile, or read from
    Triton's cache on disk, by name."""

    def run(tokens, device, deterministic=False, choose=None):
        for module in (launch, statistics):
            monkeypatch.setattr(module, "_plans", replay.Plans())
        seen = []
        with (
            host_time.no_driver(made=lambda *key: seen.append(key), device=device),
            torch.no_grad(),
        ):
            for T in tokens:
                inputs = cases.make(cases.replace(LAYER, T=T), torch.bfloat16)
                call = make_call(**inputs, deterministic=deterministic)
                config = choose(call) if choose else configs.CHOICES["sm_90"][1].config
                launch.run(call, config, (T, deterministic))
                layer = LayerStatistics(4)
                layer._fused = True
                slots = (call.top_k_index, call.top_k_weights, *torch.ones(2, T, 3))
                layer.update(*slots, torch.ones(T, dtype=torch.bool))
        return seen

    return run


def names(seen) -> list[str]:
    return sorted(name.removesuffix("_kernel") for name, _ in seen)


def test_a_kernel_is_compiled_once_for_any_number_of_tokens(compiled):
    """Though 1 and what 16 divides are numbers that triton likes to compile for."""
    once = ["down", "finish", "gate_up", "route", "statistics"]
    assert names(compiled((40,), -2)) == once
    assert names(compiled(FEW + MANY, -3)) == sorted([*once, "count", "place", "scan"])
    assert names(compiled(FEW + MANY, -4, deterministic=True)) == names(compiled(MANY + FEW, -5))


def test_another_process_compiles_nothing_for_other_tokens(compiled):
    """Its keys are the same, which with sources and options are those of the cache on disk."""

    def choose(call):
        return configs.choose(call, "sm_90", configs.SHARED_LIMIT["sm_90"], 50 << 20)

    one = compiled((1, 2, 33, 100, 1400), -6, choose=choose)
    other = compiled((3, 8, 64, 129, 5000), -7, choose=choose)
    assert set(other) == set(one) and len(one) == len(set(one))


class Timer:
    """threading.Timer with a clock that is set by hand."""

    made: list["Timer"] = []

    def __init__(self, seconds, function, args):
        self.seconds, self.due, self.state = seconds, lambda: function(*args), "made"
        self.made.append(self)

    def start(self):
        self.state = "waits"

    def cancel(self):
        self.state = "cancelled"

    def pass_by(self, seconds):
        if self.state == "waits" and seconds >= self.seconds:
            self.due()


@pytest.fixture
def announce(monkeypatch, caplog):
    from reap_kernels.triton import announce

    monkeypatch.setattr(announce, "_said", announce.threading.Event())
    monkeypatch.setattr(announce, "threading", SimpleNamespace(Timer=Timer))
    monkeypatch.setattr(Timer, "made", [])
    caplog.set_level(logging.WARNING)
    return announce


def test_what_takes_long_is_said_once(announce, caplog):
    with host_time.no_driver(), announce.announced(), announce.announced():
        first, second = Timer.made
        first.pass_by(announce.PATIENCE)
        second.pass_by(announce.PATIENCE)
    with host_time.no_driver(), announce.announced():
        assert len(Timer.made) == 2
    (said,) = caplog.messages
    assert said.startswith("compiling Triton kernels for sm_90: about 10 s")
    assert str(triton.knobs.cache.dir) in said


def test_what_is_quick_says_nothing(announce, caplog):
    with host_time.no_driver(), announce.announced():
        (timer,) = Timer.made
        timer.pass_by(0.9 * announce.PATIENCE)
    timer.pass_by(9 * announce.PATIENCE)
    assert timer.state == "cancelled" and not caplog.messages
