"""Weights that come by copies beside the computing: in the right order, and never more than two
layers of them. The device of these tests does a copy as late as it may."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import saved
from test_streaming import some

from reap.errors import ReapError
from reap.model.layerwise import Layerwise
from reap.model.load import load_model
from reap.model.staging import CudaQueues, Staging
from reap.runs.calibration import calibrate
from reap.runs.streaming import Stream
from reap.runs.waves import calibrate_streamed

PIECE = 1000  # bytes


class Late:
    """A device on which nothing is copied until someone waits for it, and whose memory holds NaN
    before. What computes is through with what was issued once copies wait for it."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.issued: deque[Any] = deque()
        self.log: list[str] = []
        self.live = self.most = 0  # bytes
        self.in_use: object | None = None  # the event behind the last use of memory given back

    def pinned(self, size: int) -> torch.Tensor:
        return torch.full((PIECE,), 255, dtype=torch.uint8)

    def room(self, like: torch.Tensor) -> torch.Tensor:
        if not like.nbytes:
            return torch.empty_like(like)
        memory = np.full(like.nbytes, 255, np.uint8)
        self.live += len(memory)
        self.most = max(self.most, self.live)
        weakref.finalize(memory, self._gone, len(memory))
        strides = torch.empty_like(like, device="meta").stride()
        flat = torch.from_numpy(memory)[: like.nbytes].view(like.dtype)
        return flat.as_strided(like.shape, strides)

    def _gone(self, size: int) -> None:
        self.live -= size

    def copy(self, to: torch.Tensor, pinned: torch.Tensor) -> None:
        assert self.in_use is None, "copied into memory that is still used"
        self.issued.append((to, pinned))

    def copied(self) -> object:
        self.issued.append(event := object())
        return event

    def computed(self) -> object:
        self.log.append("computed")
        self.in_use = object()
        return self.in_use

    def copies_wait(self, event: object) -> None:
        assert event is self.in_use
        self.in_use = None

    def computing_waits(self, event: object) -> None:
        self._until(event)

    def host_waits(self, event: object) -> None:
        self._until(event)

    def _until(self, event: object) -> None:
        while event in [one for one in self.issued if not isinstance(one, tuple)]:
            step = self.issued.popleft()
            if isinstance(step, tuple):
                step[0].copy_(step[1])


def streamed(folder: Path, model_type: str, queues: Late, monkeypatch: Any) -> Any:
    send, run = Layerwise._send, Stream.run

    def sends(self: Any, unit: Any, staging: Any) -> Any:
        queues.log.append(f"send {unit.name}")
        return send(self, unit, staging)

    def runs(self: Any, unit: Any, then: Any = None) -> None:
        queues.log.append(f"run {unit.name}")
        run(self, unit, then)

    monkeypatch.setattr(Layerwise, "_send", sends)
    monkeypatch.setattr(Stream, "run", runs)
    padded = model_type != "diffusion_gemma"
    return calibrate_streamed(Layerwise(folder, queues=queues), some(model_type, padded=padded))


LATER = ["gemma4", "zaya", "llama4_text", "nemotron_h"]
MODELS = [
    *("qwen3_moe", "diffusion_gemma"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in LATER),
]


@pytest.mark.parametrize("model_type", MODELS)
def test_the_bits_of_a_run_in_memory(tmp_path: Path, monkeypatch: Any, model_type: str) -> None:
    saved(tmp_path, model_type)
    batches = some(model_type, padded=model_type != "diffusion_gemma")
    torch.manual_seed(0)
    plain = calibrate(load_model(tmp_path, device="cpu"), batches)
    torch.manual_seed(0)
    assert streamed(tmp_path, model_type, Late(), monkeypatch).digest() == plain.digest()


def test_copies_beside_the_computing(tmp_path: Path, monkeypatch: Any) -> None:
    """Each layer is sent while the one before it runs, which is dropped when all of it is issued;
    two are on the device, never three."""
    saved(tmp_path)
    queues = Late()
    streamed(tmp_path, "qwen3_moe", queues, monkeypatch)
    # The first batch shows what it needs in the first layer; then the others follow it.
    layer = "model.layers."
    assert queues.log == [
        *(f"send {layer}0", f"run {layer}0", "computed"),
        *(f"send {layer}0", f"run {layer}0", f"send {layer}1", "computed"),
        *(f"run {layer}1", f"send {layer}2", "computed"),
        *(f"run {layer}2", f"send {layer}3", "computed"),
        *(f"run {layer}3", "computed"),
    ]
    with closing(Layerwise(tmp_path)) as layers:
        assert queues.most <= 2 * max(unit.nbytes for unit in layers.units)
    assert queues.live == 0


@pytest.mark.parametrize("missing", ["computing_waits", "host_waits", "copies_wait"])
def test_a_wait_that_is_missing_shows(tmp_path: Path, monkeypatch: Any, missing: str) -> None:
    saved(tmp_path)
    plain = calibrate(load_model(tmp_path, device="cpu"), some("qwen3_moe"))
    monkeypatch.setattr(Late, missing, lambda self, event: None)
    try:
        found = streamed(tmp_path, "qwen3_moe", Late(), monkeypatch)
    except (ReapError, AssertionError) as error:
        assert "copied into memory that is still used" in str(error) or "NaN" in str(error)
    else:
        assert found.digest() != plain.digest()


def test_a_layer_that_is_kept_shows(tmp_path: Path, monkeypatch: Any) -> None:
    """That there are two layers at most is seen by these tests."""
    saved(tmp_path)
    queues, kept, take = Late(), list[Any](), Staging.take

    def keeps(self: Staging, sent: Any) -> list[torch.Tensor]:
        kept.append(sent)
        return take(self, sent)

    monkeypatch.setattr(Staging, "take", keeps)
    streamed(tmp_path, "qwen3_moe", queues, monkeypatch)
    with closing(Layerwise(tmp_path)) as layers:
        assert queues.most > 2 * max(unit.nbytes for unit in layers.units)


@pytest.mark.parametrize("sizes", [(0,), (3, 5), (40, 30), (2, 30, 40), ()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_any_tensor(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Its bits and the order of its elements; gaps are left out."""
    whole = torch.randint(0, 255, (math.prod(sizes) * dtype.itemsize,), dtype=torch.uint8)
    tensor = whole.view(dtype).view(sizes)
    staging = Staging(Late(), PIECE)
    given = [tensor, tensor.mT if tensor.dim() > 1 else tensor, tensor.clone()]
    given += [tensor[:, 1:]] if tensor.dim() > 1 else []
    for one, other in zip(given, staging.take(staging.send(given)), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        same = one.contiguous().view(torch.uint8) if one.dim() else one
        assert torch.equal(same, other.contiguous().view(torch.uint8) if one.dim() else other)
        assert other.stride() == torch.empty_like(one).stride()


class Stream_:
    """Of torch.cuda, without a GPU: which stream got what."""

    def __init__(self, *_: Any) -> None:
        self.said: list[Any] = []

    def wait_event(self, event: Any) -> None:
        self.said.append(("waits", event))


class Event:
    waited = False

    def record(self, stream: Stream_) -> None:
        stream.said.append(("event", self))

    def synchronize(self) -> None:
        self.waited = True


def test_streams_of_a_gpu(monkeypatch: Any) -> None:
    """Copies are issued to one stream, and events and waits of each go to their own."""
    current, entered = Stream_(), list[Stream_]()

    @contextmanager
    def stream(one: Stream_) -> Iterator[None]:
        entered.append(one)
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream_)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    queues = CudaQueues(torch.device("cpu"))
    monkeypatch.setattr(queues, "pinned", lambda size: torch.empty(8, dtype=torch.uint8))
    staging, copies = Staging(queues), queues._copies
    sent = staging.send([torch.arange(6)])
    assert set(entered) == {copies} and not current.said
    assert [what for what, _ in copies.said] == ["event"] * 7  # a piece is 8 bytes: 6, and all
    pieces = [event for _, event in copies.said]
    assert [event.waited for event in pieces] == [True] * 4 + [False] * 3
    (found,) = staging.take(sent)
    assert torch.equal(found, torch.arange(6)) and current.said == [("waits", sent.event)]
    staging.drop()
    (_, used) = current.said[-1]
    staging.send([torch.arange(1)])
    assert copies.said[7] == ("waits", used) and copies.said[8][0] == "event"


@pytest.mark.gpu
@pytest.mark.parametrize("waves", [None, 20])
def test_on_a_gpu(tmp_path: Path, waves: int | None) -> None:
    saved(tmp_path, dtype=torch.bfloat16)
    batches = some("qwen3_moe")
    plain = calibrate(load_model(tmp_path, device="cuda"), batches, deterministic=True)
    found = calibrate_streamed(
        tmp_path, batches, device="cuda", deterministic=True, wave_tokens=waves
    )
    assert found.digest() == plain.digest()


@pytest.mark.gpu
def test_copies_of_a_gpu() -> None:
    """Of more than fits in the pinned pieces, again and again, beside work that takes long."""
    staging = Staging(CudaQueues(torch.device("cuda")), 1 << 20)
    busy = torch.randn(4096, 4096, device="cuda")
    for number in range(8):
        given = [torch.full((3 << 20,), number, dtype=torch.int32)]
        for _ in range(8):
            busy @ busy
        (found,) = staging.take(staging.send(given))
        wrong = (found != number).sum()
        staging.drop()
        del found
        assert int(wrong) == 0
