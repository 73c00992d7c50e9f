"""Timing on a GPU, with a torch.cuda that is made up: who is captured, whose turn it is, what a row
has."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import device, gputime, inputs, layer, memory, peers
from bench.measure import PRESETS, Settings, interleave, rows


class FakeCuda:
    """An idle GPU that does everything at once, and a clock that goes when it is looked at, or is
    told to. A call named `waits` synchronizes."""

    def __init__(self):
        self.debug, self.broken = "default", False
        self.replays = 0
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-7
        return self.now

    def takes_3_ms(self) -> None:
        self.now += 0.003

    def Event(self, enable_timing):
        assert enable_timing
        at: list[float] = []
        return SimpleNamespace(
            at=at,
            record=lambda: at.append(self.perf_counter()),
            elapsed_time=lambda other: 1e3 * (other.at[0] - at[0]),
        )

    def CUDAGraph(self):
        def replay():
            self.replays += 1

        return SimpleNamespace(replay=replay)

    def graph(self, graph):
        if self.broken:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return nullcontext()

    def set_sync_debug_mode(self, mode):
        self.debug = mode

    def wait(self):
        if self.debug == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    def stream(self, stream):
        return nullcontext()

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    def current_stream(self):
        return self.Stream()

    def current_device(self):
        return 0

    def get_device_properties(self, index):
        return SimpleNamespace(L2_cache_size=50 << 20)

    def get_device_name(self):
        return "NVIDIA H100 80GB HBM3"

    def synchronize(self):
        pass

    def empty_cache(self):
        pass


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    flushed = SimpleNamespace(zero_=lambda: None)
    empty = SimpleNamespace(cuda=fake, uint8=torch.uint8, empty=lambda *size, **kind: flushed)
    monkeypatch.setattr(gputime, "torch", empty)
    monkeypatch.setattr(gputime, "time", fake)
    monkeypatch.setattr(gputime, "kernels", lambda call: {"down_kernel": 0.5})
    monkeypatch.setattr(gputime, "SAMPLE_SECONDS", 0.002)
    monkeypatch.setattr(gputime, "ALONE_SECONDS", 0.002)
    gputime._flush_bytes.cache_clear()
    yield fake
    gputime._flush_bytes.cache_clear()


def test_what_can_be_captured_is_replayed_and_the_rest_is_called(cuda):
    def quick():
        pass

    samples, details = gputime.interleave({"quick": quick, "waits": cuda.wait}, 4, 60.0)
    assert {name: detail.method for name, detail in details.items()} == {
        "quick": "graph",
        "waits": "events",
    }
    assert all(len(ms) == 4 for ms in samples.values()) and cuda.replays > 4
    assert cuda.debug == "default"
    _, details = gputime.interleave({"quick": quick}, 1, 60.0, graphs=False)
    assert details["quick"].method == "events"


def test_a_capture_that_fails_is_timed_by_events(cuda):
    cuda.broken = True
    _, details = gputime.interleave({"any": lambda: None}, 1, 60.0)
    assert details["any"].method == "events" and cuda.replays == 0


def test_an_error_that_is_no_wait_is_not_swallowed(cuda):
    def wrong():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        gputime.interleave({"wrong": wrong}, 1, 60.0)
    assert cuda.debug == "default"


def test_host_time_is_until_the_call_returns(cuda):
    samples, details = gputime.interleave({"slow": cuda.takes_3_ms}, 1, 60.0)
    assert details["slow"].host_ms == pytest.approx(3, rel=0.01)
    assert samples["slow"][0] < 0.1, "a replay does not run the host's part"


def test_one_that_used_up_its_time_leaves_the_turn(cuda):
    calls: dict[str, Callable[[], object]] = {
        "slow": cuda.takes_3_ms,
        "quick": lambda: None,
    }
    samples, _ = gputime.interleave(calls, 6, 0.001, graphs=False)
    assert {name: len(ms) for name, ms in samples.items()} == {"slow": 3, "quick": 6}


def test_a_row_has_what_the_gpu_did(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", cuda.get_device_name)
    settings = Settings(device="cuda", rounds=2, seconds=1.0)
    impls: dict[str, Callable[[], object]] = {"reap:x": lambda: None, "peer": cuda.wait}
    samples = interleave(impls, "bf16", settings)
    assert samples.peaks == [989e12]
    ours, peer = rows("layer", ("bf16", "tiny", 7), samples, flops=10, floor_ms=0.5, routing="even")
    assert (ours.method, peer.method) == ("graph", "events")
    assert ours.floor_ms == 0.5 and ours.routing == "even" and ours.kernels == {"down_kernel": 0.5}
    assert ours.host_ms is not None and ours.alone_ms is not None and ours.clock_mhz is None
    assert set(ours.speedup_vs) == {"peer"}


def test_kernels_are_those_of_the_device(monkeypatch):
    event = SimpleNamespace
    events = [
        event(key="void down<bf16>(x)", self_device_time_total=6000.0, self_cpu_time_total=0),
        event(key="up", self_device_time_total=9000.0, self_cpu_time_total=0),
        event(key="aten::mm", self_device_time_total=9000.0, self_cpu_time_total=5),
    ]
    seen = SimpleNamespace(key_averages=lambda: events)
    monkeypatch.setattr("torch.profiler.profile", lambda activities: nullcontext(seen))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert gputime.kernels(lambda: None) == {"up": 3.0, "void down<bf16>(x)": 2.0}
    assert list(gputime.kernels(lambda: None)) == ["up", "void down<bf16>(x)"]


def test_meter_takes_the_readings_of_its_spans(monkeypatch, tmp_path):
    meter = device.Meter([(1.0, 1000, 300), (2.0, 1500, 500), (3.0, 1980, 700)])
    assert meter.clock([(2.5, 3.5)]) == 1980
    assert meter.clock([(7, 8)]) == 1500 and meter.power() == 500
    assert device.Meter().clock([(0, 1)]) is None

    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\necho "1980, 698.5"\necho "[N/A], 3"\nexec sleep 60\n')
    smi.chmod(0o755)
    monkeypatch.setattr(device, "COMMAND", (str(smi),))
    with device.metered() as meter:
        for _ in range(500):
            if meter.readings:
                break
            time.sleep(0.01)
    assert [reading[1:] for reading in meter.readings] == [(1980, 698.5)]
    monkeypatch.setattr(device, "COMMAND", ("no-such-program",))
    with device.metered() as meter:
        pass
    assert meter.readings == []


def test_layer_suite_as_on_a_gpu(cuda, monkeypatch):
    """Its own course, with tensors that stay on the CPU: modes, peers that fail, floor, routing."""
    weights, routed = inputs.weights, inputs.routed
    monkeypatch.setattr(inputs, "weights", lambda shape, dtype, where="": weights(shape, dtype))

    def on_cpu(shape, T, dtype, where="", *kind):
        return routed(shape, T, dtype, "cpu", *kind)

    monkeypatch.setattr(inputs, "routed", on_cpu)
    monkeypatch.setattr(memory, "available", lambda where: 10**10)
    monkeypatch.setattr(memory, "peak_extra", lambda call, where: (call(), 5))
    for name in ("get_device_name", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(peers, "others", lambda: ["batched_mm", "nonsense"])
    monkeypatch.setattr(layer, "ON_GPU", (*layer.ON_GPU, "nonsense"))
    said: list[str] = []
    settings = replace(
        PRESETS["smoke"], device="cuda", dtypes=("bf16",), routings=inputs.ROUTINGS, say=said.append
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        made = list(layer.run(settings))
    finally:
        torch.set_num_threads(threads)
    ours = {row.impl for row in made if row.impl.startswith("reap:")}
    assert "reap:reference+det" in ours
    even = {row.impl for row in made if row.routing == "even"}
    assert even >= {"eager", "grouped_mm", "batched_mm", "hooks", "observer", "bmm"}
    assert all(row.method and row.floor_ms and row.extra_bytes == 5 for row in made)
    assert any(line.startswith("layer: skips liger, ") for line in said)
    assert any(line.startswith("layer: skips nonsense at T=40, ") for line in said)
