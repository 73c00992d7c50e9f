"""`cuda` and `cuda_sm90` on a GPU: against the truth, in CUDA graphs, without waiting. Needs no
compiler and no emulator."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import cases
import pytest
import test_cuda_sm90
import tiles
import torch

from reap_kernels import backends, cuda, moe_saliency
from reap_kernels.contract import make_call

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16)
MISSING = {name: backends()[name] for name in ("cuda", "cuda_sm90")}
SKIPS = {
    name: pytest.mark.skipif(reason is not None, reason=str(reason))
    for name, reason in MISSING.items()
}
BOTH = [pytest.param(name, marks=skip) for name, skip in SKIPS.items()]
RUNS = [("cuda", case) for case in cases.CASES + tiles.ALIGNED + tiles.LAST]
RUNS += [("cuda_sm90", case) for case in test_cuda_sm90.CASES + tiles.ALIGNED + tiles.LAST]
FORMS = ("cooperative", "pingpong", "swapped")  # of the kernels for Hopper


def same_bits(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("backend", "case"),
    [pytest.param(backend, case, marks=SKIPS[backend]) for backend, case in RUNS],
    ids=str,
)
def test_accurate(backend, case, dtype):
    """In both modes; the deterministic one twice."""
    inputs = cases.make(case, dtype, "cuda")
    known = cases.truth(inputs), cases.plain(inputs)
    atomic = moe_saliency(**inputs, backend=backend)
    slabs = moe_saliency(**inputs, backend=backend, deterministic=True)
    cases.assert_accurate(atomic, inputs, known)
    cases.assert_accurate(slabs, inputs, known)
    assert same_bits(atomic[1:], slabs[1:]), "norms or peaks depend on the mode"
    assert same_bits(slabs, moe_saliency(**inputs, backend=backend, deterministic=True))


@SKIPS["cuda_sm90"]
@pytest.mark.parametrize("case", test_cuda_sm90.CASES + tiles.ALIGNED + tiles.LAST, ids=str)
def test_forms_agree(case):
    """Each is accurate, whichever is the one that so many rows get."""
    inputs = cases.make(case, torch.bfloat16, "cuda")
    known = cases.truth(inputs), cases.plain(inputs)
    for form, deterministic in product(FORMS, (False, True)):
        call = make_call(**inputs, deterministic=deterministic)
        cases.assert_accurate(cuda.launch(call, wgmma=True, form=form), inputs, known)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("case", (tiles.ALIGNED[1], tiles.ALIGNED[27]), ids=str)
def test_in_a_cuda_graph(case, backend):
    """Captured once, replayed on other values: there is no allocation and no wait inside."""
    inputs = cases.make(case, torch.bfloat16, "cuda")

    def run():
        return moe_saliency(**inputs, backend=backend, deterministic=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # loads the kernels, which a capture must not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    fresh = cases.make(case, torch.bfloat16, "cuda", seed=1)
    for name in ("hidden_states", "top_k_index", "top_k_weights"):
        inputs[name].copy_(fresh[name])
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(captured, run())


@pytest.mark.parametrize("backend", BOTH)
def test_the_host_never_waits(backend):
    inputs = cases.make(tiles.ALIGNED[1], torch.bfloat16, "cuda")
    moe_saliency(**inputs, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe_saliency(**inputs, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BOTH)
def test_a_negative_id_traps(backend):
    """In a process of its own: the CUDA context does not survive it."""
    code = (
        "import torch, cases, tiles; from reap_kernels import moe_saliency; "
        "inputs = cases.make(tiles.ALIGNED[1], torch.bfloat16, 'cuda'); "
        "inputs['top_k_index'][3, 1] = -2; torch.cuda.synchronize(); print('ready', flush=True); "
        f"moe_saliency(**inputs, backend={backend!r}); torch.cuda.synchronize()"
    )
    folder = Path(__file__).parent
    path = f"{folder.parent}{os.pathsep}{folder}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.stdout == "ready\n", done.stderr[-2000:]
    assert done.returncode != 0 and "CUDA error" in done.stderr
