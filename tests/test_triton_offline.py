"""The Triton backend on a machine without a GPU: interpreted, compiled ahead of time, refused."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import offline
import pytest
import torch
import triton

from reap_kernels import Saliency, backends, moe_saliency, ops
from reap_kernels import triton as backend
from reap_kernels.triton import configs

TESTS = Path(__file__).parent
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


def python(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


@no_gpu
@pytest.mark.long
def test_the_kernels_pass_their_tests_in_the_interpreter():
    suite = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_triton.py")
    assert " passed" in python(*suite, TRITON_INTERPRET="1")


def rows(chip: str) -> list[dict]:
    lines = python("tests/offline.py", chip, TRITON_INTERPRET="0").splitlines()
    return [json.loads(line) for line in lines]


def assert_clean(row: dict) -> None:
    """No spills, and for the two GEMMs no local memory at all, tensor cores where they belong, and
    no more shared memory than the chip has. (The division of fp64 numbers in the statistics is a
    call, which has a frame of 8 bytes.)"""
    assert row["spills"] == 0, row
    if "needed" in row:
        assert row["local"] == 0, row
        assert row["shared"] <= row["limit"], row
        for instruction in row["needed"]:
            assert any(found.startswith(instruction) for found in row["tensor"]), row


# One representative of each kind of matrix instruction; `slow` has every config on every chip.
@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="of compiled kernels")
@pytest.mark.parametrize("chip", ("sm_80", "sm_90", "gfx942"))
def test_large_tiles_compile_without_spills_to_tensor_cores(chip):
    found = list(offline.every(chip, large=True))
    assert [row["kernel"] for row in found] == ["gate_up_kernel", "down_kernel"]
    for row in found:
        assert_clean(row)
        slabs = chip in configs.HINTED and row["kernel"] == "down_kernel"
        assert row.get("passing", False) == slabs


@pytest.mark.slow
@pytest.mark.parametrize("chip", offline.CHIPS)
def test_every_config_compiles_without_spills_to_tensor_cores(chip):
    found = rows(chip)
    for row in found:
        assert_clean(row)
        asserting = row["kernel"] in ("route_kernel", "count_kernel")
        assert row.get("asserts", asserting) == asserting
    compiled = {row["config"] for row in found}
    family = offline.CHIPS[chip][0]
    assert {repr(choice.config) for choice in configs.CHOICES[family]} <= compiled


@pytest.mark.parametrize("family", offline.CHIPS)
def test_every_call_has_a_config_that_fits_its_chip(family):
    kind = offline.CHIPS[family][0]
    limit = configs.SHARED_LIMIT[kind]
    for variants in offline.VARIANTS.values():
        for variant in variants:
            for T in (1, 100, 4096, 1 << 17):
                assert configs.choose(offline.call(variant, T=T), kind, limit, 0)


def test_configs_follow_rows_shape_and_memory():
    plain = offline.VARIANTS[16][0]
    limit, cache = configs.SHARED_LIMIT["sm_90"], configs.CACHE["sm_90"]

    def chosen(variant, T, limit=limit, cache=cache):
        return configs.choose(offline.call(variant, T=T), "sm_90", limit, cache)

    assert chosen(plain, 1 << 14).block_m == 128
    assert chosen(plain, 1024).block_m == 64
    assert chosen(plain, 64).block_m == 16
    assert chosen(plain._replace(I=64), 1 << 14).block_m == 64
    assert chosen(plain._replace(H=2047), 1 << 14).gate_up.block_n == 32
    assert chosen(plain, 1 << 14, limit=64 << 10).shared_bytes(True, 2) <= 64 << 10
    assert chosen(plain, 1 << 14, limit=100) is None
    deep = chosen(plain._replace(H=4096, I=14336), 1 << 14)
    assert deep.gate_up.group_m == 40  # rows of 8 KiB in 50 MiB
    assert deep.down.group_m == 16
    view = offline.call(plain)
    view = view._replace(hidden_states=view.hidden_states[:, 1:])
    assert not configs.aligned(view._replace(hidden_states=view.hidden_states.T))


@pytest.mark.parametrize(
    ("capability", "family"),
    [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 9), "sm_86"), ((9, 0), "sm_90"),
     ((10, 0), "sm_100"), ((10, 3), "sm_100"), ((12, 0), "sm_86"), ((7, 5), None), ((8, 2), None)],
)  # fmt: skip
def test_family_of_a_chip(capability, family, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert configs.family(torch.device("cuda")) == family


def test_package_import_loads_no_triton():
    code = "import sys, reap_kernels; sys.exit('triton' in sys.modules)"
    python("-c", code)


def test_package_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import reap_kernels; "
        "print(reap_kernels.backends()['triton'])"
    )
    said = python("-c", code)
    assert said.startswith("triton cannot be imported") and said.endswith("pip install triton\n")


@no_gpu
def test_reasons_why_it_is_not_available(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert backend.available() == "this torch is built for CPUs only"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert str(backend.available()).startswith("no GPU that torch can use: ")
    monkeypatch.setattr("triton.__version__", "3.1.0")
    assert backend.available() == "triton is 3.1.0, must be 3.4 or newer"
    assert backends()["triton"] == backend.available()


def test_interpreter_beside_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr("triton.knobs.runtime.interpret", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = "TRITON_INTERPRET is set although there is a GPU: unset it"
    assert backend.available() == reason


@no_gpu
def test_named_it_raises_and_auto_moves_on():
    inputs = cases.make(cases.SHAPES[4], torch.float32)
    with pytest.raises(ValueError, match="cannot run this call: triton: (this torch is|no GPU)"):
        moe_saliency(**inputs, backend="triton")
    cases.assert_accurate(moe_saliency(**inputs), inputs)


def test_ids_are_read_by_the_host_only_for_backends_that_do_not_refuse_them(monkeypatch):
    inputs = cases.make(cases.SHAPES[4], torch.float32)
    inputs["top_k_index"][0, 0] = -1
    ran = Saliency(torch.ones(1, 97), torch.ones(1, 3), torch.zeros(1, 3))
    fake = SimpleNamespace(
        NAME="fake", available=lambda: None, unsupported=lambda call: None, run=lambda call: ran
    )
    monkeypatch.setattr(ops, "LADDER", (fake,))
    with pytest.raises(ValueError, match="holds the id -1"):
        moe_saliency(**inputs)
    fake.ASSERTS_IDS = True
    assert torch.equal(moe_saliency(**inputs).out, ran.out)


def test_tensors_in_host_memory_are_refused_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(backend, "available", lambda: None)
    with pytest.raises(ValueError, match="triton: tensors are on cpu, must be on a GPU"):
        moe_saliency(**cases.make(cases.SHAPES[4], torch.float32), backend="triton")


def test_a_call_runs_on_the_device_of_its_tensors(monkeypatch):
    """Which is changed to only where it is not the current one, and back."""
    from reap_kernels.triton import launch

    now, ran = 1, []

    @contextmanager
    def on(device):
        nonlocal now
        before, now = now, device.index
        yield
        now = before

    tensor = SimpleNamespace(device=SimpleNamespace(type="cuda", index=1))
    call: Any = SimpleNamespace(hidden_states=tensor, top_k_index=tensor)
    monkeypatch.setattr(backend, "signature_of", lambda call: "key")
    monkeypatch.setattr(backend, "_choices", {"key": ("config", None)})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: now)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(launch, "run", lambda *given: ran.append((now, *given)))
    backend.run(call)
    now = 0
    backend.run(call)
    assert ran == [(1, call, "config", "key")] * 2 and now == 0
