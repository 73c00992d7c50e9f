"""A plan launches what triton would: the same kernels, grids and arguments for other tensors."""

import cases
import host_time
import pytest
import torch

from reap.statistics.layerstats import LayerStatistics
from reap_kernels.contract import TENSORS, make_call
from reap_kernels.triton import configs, launch, replay, statistics

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="of compiled kernels")
BIASED = cases.Case("", T=40, H=48, I=32, bias=True, interleaved=True, transposed=True)
CASES = [
    (cases.Case("", T=40, H=48, I=32), torch.bfloat16, False),
    (cases.Case("", T=1, K=1, H=48, I=32, gated=False, activation="relu2"), torch.float32, False),
    (BIASED, torch.float16, False),
    (BIASED, torch.float16, True),
]


def launches(run, inputs):
    """What reaches the driver: grids and arguments, memory of `inputs` by number and other memory
    by the order of its first appearance."""
    others: dict = {}
    seen: list = []
    known = {x.data_ptr(): number for number, x in enumerate(inputs) if x is not None}

    def told(value):
        address = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if address in known:
            return "given", known[address]
        if type(address) is int and address > 1 << 40:  # no size is that large
            return "buffer", others.setdefault(address, len(others))
        return value

    def launched(*arguments):
        seen.append((arguments[:3], [told(value) for value in arguments[9:]]))

    with host_time.no_driver(launched), torch.no_grad():
        result = run()
    return seen, [(told(tensor), tensor.dtype, tensor.shape) for tensor in result or ()]


@pytest.mark.parametrize(("case", "dtype", "deterministic"), CASES, ids=str)
def test_a_layer(case, dtype, deterministic, monkeypatch):
    monkeypatch.setattr(launch, "_plans", plans := replay.Plans())
    config = configs.CHOICES["sm_90"][0].config

    def once(seed):
        call = make_call(**cases.make(case, dtype, seed=seed), deterministic=deterministic)
        return launches(lambda: launch.run(call, config, "key"), call[: len(TENSORS)])

    first = once(1)
    assert len(plans._plans) == 1 and len(first[0]) >= 4
    monkeypatch.setattr(replay.Recorder, "launch", None)  # now nothing but the plan can
    assert once(2) == first


def test_a_plan_is_launched_on_the_stream_of_its_call(monkeypatch):
    monkeypatch.setattr(launch, "_plans", replay.Plans())
    config, streams = configs.CHOICES["sm_90"][0].config, []
    call = make_call(**cases.make(CASES[0][0], torch.bfloat16))
    with host_time.no_driver(lambda *given: streams.append(given[3])), torch.no_grad():
        for stream in (0, 7, 8):  # the first time is triton's own launch
            monkeypatch.setattr(
                triton.runtime.driver.active, "get_current_stream", lambda device, s=stream: s
            )
            launch.run(call, config, "key")
    assert streams == [0] * 4 + [7] * 4 + [8] * 4


def slots(seed, masked):
    g = torch.Generator().manual_seed(seed)
    columns = [torch.rand(40, 2, generator=g) for _ in range(3)]
    mask = torch.rand(40, generator=g) < 0.5 if masked else None
    return (torch.randint(0, 4, (40, 2), generator=g), *columns), mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
def test_statistics(masked, pairs, monkeypatch):
    monkeypatch.setattr(statistics, "_plans", plans := replay.Plans())

    def once(seed):
        columns, mask = slots(seed, masked)
        layer = LayerStatistics(4, pairs=pairs)
        layer._fused = True
        given = [*columns, mask, layer._tokens, layer._count, layer._peak, layer._sums._limbs]
        given += [layer._faults]
        if layer._pairs is not None:
            given += [layer._pairs.live_count, layer._pairs.sums._limbs]
        seen, _ = launches(lambda: layer.update(*columns, mask), given)
        return seen

    first = once(1)
    assert len(plans._plans) == len(first) == 1
    monkeypatch.setattr(replay.Recorder, "launch", None)
    assert once(2) == first


def test_a_tensor_in_two_places_makes_no_plan(monkeypatch):
    """The next call may bring two: which was which?"""
    monkeypatch.setattr(statistics, "_plans", plans := replay.Plans())
    (ids, gates, norms, peaks), _ = slots(1, False)
    layer = LayerStatistics(4)
    layer._fused = True
    assert len(launches(lambda: layer.update(ids, gates, norms, norms), [])[0]) == 1
    assert not plans._plans
    launches(lambda: layer.update(ids, gates, norms, peaks), [])
    assert len(plans._plans) == 1


def test_alignment_and_strides_make_another_plan(monkeypatch):
    monkeypatch.setattr(statistics, "_plans", plans := replay.Plans())
    (ids, *columns), _ = slots(1, False)
    layer = LayerStatistics(4)
    layer._fused = True
    odd = torch.empty(81)[1:].view(40, 2)
    for norms in (columns[1], odd, columns[1].T.contiguous().T):
        launches(lambda norms=norms: layer.update(ids, columns[0], norms, columns[2]), [])
    assert len(plans._plans) == 3


def test_the_workspace_holds_every_buffer_apart_from_the_others():
    recorder = replay.Recorder([torch.zeros(1)])
    result = recorder.empty(3, dtype=torch.float32)
    made = [recorder.scratch(n, dtype=torch.int32) for n in (1, 0, 100, 64)]
    plan = recorder.plan()
    assert plan is not None and plan.results == [(result.shape, result.dtype)]
    ends = [at + buffer.nbytes for at, buffer in zip(plan.offsets, made, strict=True)]
    assert all(at % replay.ALIGNMENT == 0 for at in plan.offsets)
    assert all(end <= at for end, at in zip(ends, [*plan.offsets[1:], plan.size], strict=True))


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(replay, "MAX_PLANS", 2)
    plans, plan = replay.Plans(), replay.Plan([], [], [], 0)
    for key in "abc":
        plans.put(key, None, plan)
    assert plans.get("c", None) is plan and plans.get("a", None) is None
    assert plans.get("c", "another config") is None
