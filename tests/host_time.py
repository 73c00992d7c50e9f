"""What a call costs the host, in microseconds per part: medians, on one thread, no GPU needed.

    python -m tests.host_time

`op` is a layer too small to count; a backend that does nothing shows what is not the backend's.
An observed layer is one of 8 that a padded batch goes through, beyond the same with experts that do
nothing; the share of `observe` is neither the op's nor the statistics'. `triton` replaces the
driver and the compiled kernels: launches cost all that they cost up to the driver.
"""

import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import cases
import tiny
import torch

import reap
from reap.observation.measure import Measured
from reap.statistics.layerstats import LayerStatistics
from reap_kernels import Saliency, cpu, moe_saliency, ops
from reap_kernels.contract import make_call

LAYERS = 8
LAYER = cases.Case("", T=4, K=2, E=4, H=8, I=8)
Times = dict[str, float]  # what is timed -> us
_launched: list[Callable[..., object]] = []  # kernels outlive the `with` that they are made in


def median(call: Callable[[], object], repeats: int, batch: int = 20) -> float:
    """Of `repeats` times of `batch` calls each, of this thread alone: others may be busy. [us]"""
    for _ in range(batch):
        call()
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        for _ in range(batch):
            call()
        times.append((time.thread_time() - start) / batch)
    return 1e6 * statistics.median(times)


@contextmanager
def empty_backend(result: Saliency) -> Iterator[None]:
    """The op does all of its own work; what runs is nothing."""
    nothing = SimpleNamespace(
        NAME="nothing",
        ASSERTS_IDS=True,
        available=lambda: None,
        unsupported=lambda call: None,
        run=lambda call: result,
    )
    with mock.patch.object(ops, "LADDER", (nothing,)):
        yield


def op(repeats: int) -> Times:
    inputs = cases.make(LAYER, torch.float32)
    call, result = make_call(**inputs), moe_saliency(**inputs)
    with torch.no_grad():
        times = {
            "op": median(lambda: moe_saliency(**inputs), repeats),
            "  make_call": median(lambda: make_call(**inputs), repeats),
            "  select": median(lambda: ops.select(call, "auto"), repeats),
            "  cpu.run": median(lambda: cpu.run(call), repeats),
        }
        with empty_backend(result):
            times["  op without a backend"] = median(lambda: moe_saliency(**inputs), repeats)
    return times


def observe(repeats: int) -> Times:
    """Per layer, in a model: caches are as cold as they are there, which a loop would not show."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    model = tiny.tiny_model("qwen3_moe", num_hidden_layers=LAYERS)
    inputs = tiny.tiny_inputs(model, lengths=[9, 5])
    slots = inputs["input_ids"].numel(), model.config.num_experts_per_tok
    hidden = torch.ones(slots[0], model.config.hidden_size)
    result = Saliency(hidden, torch.ones(slots), torch.ones(slots))
    measured = Measured(*result)
    no_op = mock.patch("reap.observation.measure.fused", lambda *_, **__: measured)
    no_statistics = mock.patch.object(reap.Statistics, "update", lambda *_, **__: None)

    def run() -> None:
        model.model(**inputs)

    def per_layer() -> float:
        return median(run, repeats, 2) / LAYERS

    def install() -> None:
        with reap.observe(model):
            pass

    def first() -> None:
        with reap.observe(model):
            run()

    ALL_EXPERTS_FUNCTIONS["nothing"] = lambda self, hidden, *_: hidden
    model.config._experts_implementation_internal = "nothing"
    try:
        with torch.inference_mode():
            bare, installed, once = per_layer(), median(install, 9, 1), median(first, 9, 1)
            with reap.observe(model):
                full = per_layer()
                with empty_backend(result):
                    empty = per_layer()
                    with no_statistics:
                        own = per_layer()
                with no_op, no_statistics:
                    share = per_layer()
    finally:
        del ALL_EXPERTS_FUNCTIONS["nothing"]
    return {
        "an observed layer": full - bare,
        "  share of observe": share - bare,
        "  op without a backend": own - share,
        "  backend": full - empty,
        "  statistics": empty - own,
        "a model observed and not called": installed,
        "  its first call beyond a later one": once - installed - full * LAYERS,
    }


@contextmanager
def no_driver(
    launched: Callable[..., object] = lambda *_: None,
    made: Callable[..., object] = lambda *_: None,
    device: int = -1,
) -> Iterator[None]:
    """Triton launches on tensors in host memory, as on an sm_90, up to the driver, in place of
    which `launched` gets the grid, four things and the arguments. `made` gets the name and the key
    of each kernel that triton would compile: once for each `device`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    class Kernel(CompiledKernel):
        function = packed_metadata = None
        run = staticmethod(lambda *given: _launched[-1](*given))

        def __init__(self) -> None:
            pass

        def __del__(self) -> None:
            pass

        def _init_handles(self) -> None:
            pass

        def launch_metadata(self, *_: object) -> None:
            pass

    def compiled(self, key, signature, device, *_):
        made(self.__name__, key)
        return self.device_caches[device][0].setdefault(key, Kernel())

    driver = SimpleNamespace(
        get_current_device=lambda: device,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(JITFunction, "_do_compile", compiled),
    ):
        _launched.append(launched)
        try:
            yield
        finally:
            _launched.pop()


def triton(repeats: int) -> Times:
    from reap_kernels import triton as backend
    from reap_kernels.triton import configs, launch
    from reap_kernels.triton.replay import Plans

    case = cases.Case("", T=64, K=2, E=4, H=64, I=64)
    inputs = cases.make(case, torch.bfloat16)
    call = make_call(**inputs)
    layer = LayerStatistics(4)
    layer._fused = True
    slots = (call.top_k_index, call.top_k_weights, torch.ones(64, 2), torch.ones(64, 2))
    config = configs.choose(call, "sm_90", configs.SHARED_LIMIT["sm_90"], configs.CACHE["sm_90"])
    assert config is not None

    def op() -> object:
        return moe_saliency(**inputs, backend="triton")

    def first() -> object:
        with mock.patch.object(launch, "_plans", Plans()):
            return launch.run(call, config, None)

    with (
        no_driver(),
        torch.no_grad(),
        mock.patch.object(backend, "available", lambda: None),
        mock.patch.object(backend, "_interpreting", lambda: True),
        mock.patch.object(backend, "check_ids", lambda ids: None),
        mock.patch.object(backend, "_choices", {}),
        mock.patch.object(configs, "choose", lambda *_: config),
        mock.patch.object(launch, "_plans", Plans()),
    ):
        return {
            "triton, the op": median(op, repeats),
            "  its choice of a config": median(lambda: backend.unsupported(call), repeats),
            "  four launches": median(lambda: launch.run(call, config, None), repeats),
            "  the same for the first time": median(first, repeats),
            "triton's statistics": median(lambda: layer.update(*slots), repeats),
        }


def measure(repeats: int = 51) -> Times:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return op(repeats) | observe(repeats) | triton(repeats)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    logging.disable()
    for part, us in measure().items():
        print(f"{part:<50} {us:8.1f}")
