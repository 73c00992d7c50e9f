"""The `cuda` backend around its kernels: when it runs, what it says if not, what it hands over."""

import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import setuptools
import torch

from reap_kernels import cuda, moe_saliency, native, ops, triton
from reap_kernels.contract import make_call

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="looks at a machine without a GPU")
built = pytest.mark.skipif(native.missing("_cuda") is not None, reason=str(native.missing("_cuda")))
FAKE = SimpleNamespace(architectures="sm_80 sm_90a compute_90", device_count=lambda: 1)


def call_of(case=cases.SHAPES[4], dtype=torch.bfloat16, **changes):
    return make_call(**cases.make(case, dtype) | changes)


def with_gpu(monkeypatch, extension=FAKE, sm=(9, 0)):
    """As if there were one GPU and a torch for it."""
    found = SimpleNamespace(
        major=sm[0], minor=sm[1], multi_processor_count=132, L2_cache_size=50 << 20
    )
    monkeypatch.setitem(native._extensions, "_cuda", extension)
    monkeypatch.setattr(native, "ModuleType", SimpleNamespace)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    cuda.chip.cache_clear()


@pytest.fixture(autouse=True)
def forget_chips():
    yield
    cuda.chip.cache_clear()


def test_reasons_why_it_is_not_built(monkeypatch):
    def reason(error):
        monkeypatch.setitem(native._extensions, "_cuda", error)
        return cuda.available()

    absent = ModuleNotFoundError("No module named 'reap_kernels._cuda'")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert reason(absent).startswith(
        "the CUDA extension is not built: install the CUDA toolkit (nvcc)"
    )
    monkeypatch.setattr("shutil.which", lambda name: "/opt/nvcc")
    assert reason(absent).startswith(
        "the CUDA extension is not built, although there is /opt/nvcc: in a checkout run"
    )
    assert (
        reason(ImportError("libx.so: no")) == "the extension _cuda cannot be loaded (libx.so: no)"
    )
    with pytest.raises(ImportError, match="libx.so: no"):
        native.module("_cuda")


@no_gpu
def test_reasons_why_it_does_not_run(monkeypatch):
    monkeypatch.setitem(native._extensions, "_cuda", FAKE)
    monkeypatch.setattr(native, "ModuleType", SimpleNamespace)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda.available() == "this torch is built for CPUs only"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert cuda.available() == "this torch is built for ROCm"
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert str(cuda.available()).startswith("no GPU that torch can use: ")


@no_gpu
def test_a_driver_older_than_the_toolkit_is_a_reason(monkeypatch):
    def device_count():
        raise RuntimeError("cudaErrorInsufficientDriver: old")

    with_gpu(monkeypatch, SimpleNamespace(architectures="sm_80", device_count=device_count))
    reason = str(cuda.available())
    assert reason.startswith("cudaErrorInsufficientDriver: old: the driver may be older")
    assert reason.endswith("update it, or build with an older nvcc")


@no_gpu
@pytest.mark.parametrize(
    ("architectures", "sm", "fits"),
    [
        ("sm_80", (8, 0), True), ("sm_80", (8, 9), True), ("sm_80", (9, 0), False),
        ("sm_80", (7, 5), False), ("sm_86", (8, 0), False), ("sm_90a", (9, 0), True),
        ("sm_90a", (10, 0), False), ("sm_90a compute_90", (10, 3), True),
        ("compute_80", (12, 0), True), ("compute_120", (10, 0), False),
        ("sm_100f", (10, 0), True),
    ],
)  # fmt: skip
def test_chips_that_a_build_has_code_for(architectures, sm, fits, monkeypatch):
    with_gpu(monkeypatch, SimpleNamespace(architectures=architectures, device_count=lambda: 1), sm)
    number = 10 * sm[0] + sm[1]
    reason = (
        f"the GPU is an sm_{number}, and the extension is built for {architectures}: "
        "set REAP_CUDA_ARCHS"
    )
    assert cuda.available() == (None if fits else reason)


@no_gpu
def test_unsupported_calls_say_why(monkeypatch):
    with_gpu(monkeypatch)
    assert cuda.available() is None
    assert cuda.unsupported(call_of()) == "tensors are on cpu, must be on a GPU"
    for dtype in ("float32", "float64"):
        call = call_of(dtype=getattr(torch, dtype))
        assert (
            cuda.unsupported_sizes(call)
            == f"hidden_states has dtype {dtype}, must be bfloat16 or float16"
        )
    call = call_of(cases.Case("", T=1, E=4097, H=4, I=2))
    assert cuda.unsupported_sizes(call) == "4097 experts, at most 4096"
    ids = torch.zeros(1, 1, dtype=torch.int64).expand(1, (1 << 30) + 1)
    call = call_of()._replace(top_k_index=ids)
    assert cuda.unsupported_sizes(call) == (
        "1073741825 slots, at most 1073741824: pass fewer tokens at a time"
    )


@no_gpu
def test_named_it_raises_and_auto_moves_on():
    inputs = cases.make(cases.SHAPES[4], torch.bfloat16)
    with pytest.raises(
        ValueError, match=f"cannot run this call: cuda: {str(cuda.available())[:40]}"
    ):
        moe_saliency(**inputs, backend="cuda")
    cases.assert_accurate(moe_saliency(**inputs), inputs)


@no_gpu
@pytest.mark.parametrize(
    ("sm", "H", "without", "chosen"),
    [
        ((9, 0), 64, None, "cuda_sm90"),
        ((9, 0), 97, None, "triton"),  # TMA cannot read that
        ((9, 0), 97, "no triton", "cuda"),
        ((8, 0), 64, None, "triton"),
        ((10, 0), 64, None, "triton"),
        ((10, 0), 64, "no triton", "cuda"),
    ],
)
def test_auto_takes_what_was_the_fastest_on_the_chip(sm, H, without, chosen, monkeypatch):
    with_gpu(monkeypatch, sm=sm)
    call = call_of(cases.Case("", H=H, I=64))
    monkeypatch.setattr(cuda, "unsupported", cuda.unsupported_sizes)  # the tensors are on the CPU
    monkeypatch.setattr(ops.cpu, "unsupported", lambda call: "tensors are on a GPU")
    monkeypatch.setattr(triton, "available", lambda: without)
    monkeypatch.setattr(triton, "unsupported", lambda call: None)
    assert ops.select(call, "auto").NAME == chosen


def test_auto_tries_every_backend_and_a_name_one():
    assert ops.named("auto") == ops.LADDER
    assert ops.named("cuda") == (cuda,)


def test_hands_over_a_layer_a_workspace_and_a_stream():
    """The protocol of `execute`, on an extension that writes down what it is given."""
    given: dict[str, Any] = {}

    def run_layer(layer, workspace, stream):
        given.update(numbers=native.NUMBERS.unpack(layer), workspace=workspace, stream=stream)

    fake: Any = SimpleNamespace(
        dtypes={"bf16": 70, "f32": 72}, activations={"silu": 80}, forms={"automatic": 90},
        workspace_bytes=lambda layer: 512, run_layer=run_layer,
    )  # fmt: skip
    call = call_of(cases.SHAPES[0])
    call = call._replace(top_k_index=call.top_k_index.contiguous())  # others are copied
    chip = cuda.Chip(device=3, sm=90, processors=132, cache=50 << 20)
    result = cuda.execute(fake, call, chip, 77)
    assert given["stream"] == 77 and given["workspace"] % 64 == 0
    x, up, down = call.hidden_states, call.gate_up_proj, call.down_proj
    assert (
        given["numbers"]
        == (
            *(call.T, call.K, call.E, call.H, call.I, 70, 80, True, False),
            *(x.data_ptr(), call.H),
            *(up.data_ptr(), call.R * call.H, call.H, 1, 0, 0, 0),
            *(down.data_ptr(), call.H * call.I, call.I, 1, 0, 0, 0),
            *(call.top_k_index.data_ptr(), True, call.top_k_weights.data_ptr(), 72),
            *(tensor.data_ptr() for tensor in result),
            *(0, 0, 0),  # no sums
            *(0, False, False, 90, *chip),
            *call.activation[1:],
        )
    )
    assert [r.shape for r in result] == [(33, 97), (33, 3), (33, 3)]


@built
def test_an_extension_of_another_build_is_told_by_the_number_of_fields():
    for size in (0, native.NUMBERS.size - 8, native.NUMBERS.size + 8):
        with pytest.raises(ValueError, match="wrong number of fields"):
            native.module("_cuda").workspace_bytes(bytes(size))


def test_no_token_launches_nothing():
    nothing: Any = None
    result = cuda.execute(nothing, call_of(cases.SHAPES[3]), nothing, 0)
    assert [r.shape for r in result] == [(0, 97), (0, 3), (0, 3)]


@built
def test_the_extension_imports_without_torch_and_without_a_driver():
    path = str(native.module("_cuda").__file__)
    code = (
        "import importlib.util, sys; "
        f"spec = importlib.util.spec_from_file_location('_cuda', {path!r}); "
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(path).parent.parent)


@built
@no_gpu
def test_errors_have_the_name_of_the_cuda_error():
    extension, nobody = native.module("_cuda"), "cudaError(InsufficientDriver|NoDevice): .* in "
    with pytest.raises(RuntimeError, match=nobody + "cudaGetDeviceCount"):
        extension.device_count()
    chip = cuda.Chip(device=0, sm=90, processors=132, cache=50 << 20)
    with pytest.raises(RuntimeError, match=nobody + "cudaSetDevice"):
        cuda.execute(extension, call_of(), chip, 0)


def build_cuda(monkeypatch, tmp_path, nvcc: str) -> str | None:
    """What `pip install` does with csrc/cuda and this script in the place of nvcc: None if the
    extension is left out, otherwise all commands that nvcc got, in order of their end."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/log\n{nvcc}\n")
    (tmp_path / "bin/nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.chdir(Path(__file__).parent.parent)
    given: dict = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path("setup.py")
    extensions = [e for e in given["ext_modules"] if e.name.endswith("_cuda")]
    if not extensions:
        return None
    command = given["cmdclass"]["build_ext"](setuptools.Distribution({"ext_modules": extensions}))
    command.build_lib = command.build_temp = str(tmp_path)
    command.ensure_finalized()
    command.run()
    return (tmp_path / "log").read_text()


def test_nvcc_compiles_every_source_for_the_architectures_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("REAP_CUDA_ARCHS", "sm_86 compute_90")
    log = str(build_cuda(monkeypatch, tmp_path, "exit 0")).splitlines()
    assert "-shared -cudart static" in log[-1]
    for line in log[:-1]:
        assert "arch=compute_86,code=sm_86 " in line and "arch=compute_90,code=compute_90 " in line
    sources = {line.partition("csrc/cuda/")[2].split()[0] for line in log[:-1]}
    assert {"layer.cu", "bindings.cpp"} <= sources


def test_an_nvcc_that_fails_costs_the_cuda_backend_only(monkeypatch, tmp_path, caplog):
    build_cuda(monkeypatch, tmp_path, "exit 3")
    (said,) = [r.getMessage() for r in caplog.records if "building extension" in r.getMessage()]
    assert "reap_kernels._cuda" in said and "exit code 3" in said and "\n" not in said.strip()


def test_no_architecture_leaves_it_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("REAP_CUDA_ARCHS", "")
    assert build_cuda(monkeypatch, tmp_path, "exit 0") is None
    assert "the cuda backend is left out: REAP_CUDA_ARCHS is empty" in capsys.readouterr().out


def test_no_nvcc_leaves_it_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    assert build_cuda(monkeypatch, tmp_path, "exit 0") is None
    assert "the cuda backend is left out: no nvcc" in capsys.readouterr().out
