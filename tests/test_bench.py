"""Every suite runs at tiny sizes, writes sane rows, and refuses to time a wrong kernel."""

import csv
import gc
import io
import itertools
import json
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import processes
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import reap_kernels
from bench import device, gate, inputs, layer, memory, peers, report, roof
from bench.__main__ import ON_GPU, SUITES, app, run
from bench.measure import PRESETS, Samples, Settings, interleave, rows
from bench.row import COLUMNS, Log, Row
from bench.shapes import REAL, TINY, Shape
from reap_kernels import cpu


def forked(command, **options):
    python = command[0] == sys.executable
    return (processes if python else subprocess).run(command, **options)


pytestmark = pytest.mark.long
ROOFED = pytest.mark.skipif(roof.missing() is not None, reason=f"{roof.missing()}")


QUICK = [suite for suite in SUITES if suite != "ranks"]  # that starts many processes


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """All suites once: their rows, the folder, and what was printed. Their processes are forks."""
    out = tmp_path_factory.mktemp("bench")
    said: list[str] = []
    settings = replace(PRESETS["smoke"], scratch=out / "scratch", say=said.append)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    here = pytest.MonkeyPatch()
    for module in ("prune", "stream"):
        here.setattr(f"bench.{module}.subprocess", SimpleNamespace(run=forked))
    try:
        with open(out / "tables", "w") as file:
            made, refused = run(QUICK, settings, out, Console(file=file, width=160))
    finally:
        torch.set_num_threads(threads)
        here.undo()
    assert not refused, said
    return made, out, said


def test_every_suite_has_rows_of_us_and_of_peers(smoke):
    made, _, _ = smoke
    impls = {suite: {row.impl for row in made if row.bench == suite} for suite in QUICK}
    if roof.missing() is None:
        assert impls["roof"] == {"fma_peak", "read"}
    others = {"eager", "grouped_mm", "hooks", "observer"}
    backends = {name for name, why in reap_kernels.backends().items() if why is None}
    ours = {f"reap:{name}" for name in backends & {"cpu", "reference"}}
    assert others | ours <= impls["layer"]
    assert others | ours | {"eager without head"} <= impls["calibrate"]
    if "cpu" in backends:
        assert impls["norms"] == {"reap:cpu", "cpu, norms off"}
        assert impls["sums"] == {"reap:cpu", "reap:cpu with sums"}
    assert impls["prune"] == {"reap", "reap --no-verify", "cp -r", "cp -r; sync"}
    assert {"reap:update", "reap:update+pairs", "layer eager"} <= impls["stats"]
    assert impls["stream"] == {"reap layer by layer", "in memory"}
    forwards, evaluations = {"plain forward", "reap: masked forward"}, {"one plan", "ten plans"}
    assert impls["masks"] == forwards | {f"reap: {name}" for name in evaluations}


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "limit"), [("ranks", None), ("stream", "2G")])
def test_suites_of_many_processes(tmp_path, suite, limit):
    settings = replace(PRESETS["smoke"], scratch=tmp_path, limit=limit, say=lambda line: None)
    made, refused = run([suite], settings, tmp_path, Console(file=io.StringIO()))
    assert not refused
    names = {
        "ranks": {"reap 2 ranks x 1 thread", "1 process x 2 threads", "1 process x 1 thread"},
        "stream": {"reap layer by layer, at most 2G", "reap layer by layer, all"},
    }
    assert {row.impl for row in made} == names[suite]


def test_rows_are_sane(smoke):
    made, _, _ = smoke
    for row in made:
        assert 0 < row.ms_p20 <= row.ms_median <= row.ms_p80, row
        assert row.gflops is None or row.gflops > 0
        assert row.fraction_of_peak is None or 0 < row.fraction_of_peak < 1.5
        assert row.extra_bytes is None or row.extra_bytes >= 0
        assert "threads" in row.machine and torch.__version__.startswith(
            row.versions["torch"] or "?"
        )
        group = [r for r in made if (r.bench, r.dtype, r.shape, r.T) == _size(row)]
        for peer, times in row.speedup_vs.items():
            (other,) = [r for r in group if r.impl == peer]
            if row.bench not in ("norms", "sums"):  # theirs is a median of ratios
                assert times == pytest.approx(other.ms_median / row.ms_median)
            assert times > 0
    for row in made:
        if row.bench == "layer":
            assert row.gflops == pytest.approx(TINY.flops(row.T) / row.ms_median / 1e6)
            assert (row.speedup_vs == {}) == (not row.impl.startswith("reap"))


def _size(row):
    return row.bench, row.dtype, row.shape, row.T


def test_files_hold_the_rows(smoke):
    made, out, _ = smoke
    lines = (out / "rows.jsonl").read_text().splitlines()
    assert [Row.from_json(line) for line in lines] == made
    cells = list(csv.DictReader(io.StringIO((out / "rows.csv").read_text())))
    assert len(cells) == len(made) and tuple(cells[0]) == COLUMNS
    assert [float(cell["ms_median"]) for cell in cells] == [row.ms_median for row in made]
    assert [json.loads(cell["speedup_vs"]) for cell in cells] == [row.speedup_vs for row in made]


def test_tables_and_plots(smoke):
    _, out, said = smoke
    tables = (out / "tables").read_text()
    assert all(suite in tables for suite in QUICK if suite != "roof" or not roof.missing())
    for name in ("roofline-bf16.png", "speedup-fp32.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert any("llm-compressor" in line for line in said), "a peer is left out without a word"


def test_another_header_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("impl,ms\n")
    with pytest.raises(ValueError, match="has the columns impl,ms"):
        Log(tmp_path)


def test_appended_files_keep_one_header(tmp_path, smoke):
    row = smoke[0][0]
    for _ in range(2):
        Log(tmp_path).add(row)
    assert (tmp_path / "rows.csv").read_text().count("bench,impl,") == 1
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("field", ["out", "norms", "peaks"])
def test_a_wrong_kernel_is_not_timed(field):
    with torch.inference_mode():
        given = inputs.weights(TINY, torch.float32) | inputs.routed(TINY, 5, torch.float32)
        result = reap_kernels.moe_saliency(**given, backend="reference")
        gate.check("right", result, given)
        wrong = result._replace(**{field: getattr(result, field) * (1 + 1e-4)})
        with pytest.raises(gate.WrongResult, match=f"wrong at T=5.*{field}"):
            gate.check("wrong", wrong, given)


def test_a_suite_with_a_wrong_kernel_ends_without_its_rows(monkeypatch, tmp_path):
    def wrong(backend, given):
        result = reap_kernels.moe_saliency(**given, backend=backend)
        return lambda: result._replace(norms=result.norms + 1)

    monkeypatch.setattr("bench.layer.ours", wrong)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["layer", "--smoke", "--dtype", "fp32"])
    assert result.exit_code == 1
    assert "layer: stops, nothing wrong is timed: reap:" in result.output
    assert not (tmp_path / "out/bench/rows.jsonl").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--smoke", "--quick"], "not both"),
        (["--dtype", "int8"], "'int8': it must be one of bf16, fp32, fp16"),
        (["--isas", "mmx"], "'mmx': it must be one of"),
        (["--device", "tpu"], "'tpu' is not one of"),
        (
            ["prune", "--device", "cuda"],
            "calibrate, stats, masks run there, not prune",
        ),
        (["--routing", "odd"], "'odd': it must be one of uniform, even"),
        (["--device", "cuda", "--isas", "portable"], "--isas are those of --device cpu"),
        (["--shapes", "gpt-2"], "'gpt-2': it must be one of qwen3-30b-a3b"),
        (["--tokens", "8,-1"], "'8,-1': it must be positive numbers"),
        (["speed"], "speed"),
    ],
)
def test_mistakes_are_told_before_anything_runs(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and not any(tmp_path.iterdir())
    assert message in " ".join(result.output.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_told():
    result = CliRunner().invoke(app, ["--device", "cuda"])
    assert result.exit_code == 2 and "torch finds no GPU" in result.output


@pytest.mark.gpu
def test_suites_on_a_gpu(tmp_path):
    settings = replace(PRESETS["smoke"], device="cuda", dtypes=("bf16",), routings=inputs.ROUTINGS)
    made, refused = run(list(ON_GPU), settings, tmp_path, Console(width=160))
    layers = [row for row in made if row.bench == "layer"]
    assert not refused and {"eager", "observer", "bmm"} < {row.impl for row in layers}
    assert all("CUDA" in row.machine and row.extra_bytes is not None for row in layers)
    assert {row.routing for row in layers} == set(inputs.ROUTINGS)
    for row in layers:
        assert row.method in ("graph", "events") and row.host_ms and row.alone_ms and row.kernels
    assert {row.bench for row in made} == {"layer", "stats", "calibrate"}


def test_only_what_is_asked_for(tmp_path):
    """Slow observers can be left out, and a forward beside ours needs no comparison with it."""
    wanted = ("reap:reference", "eager without head")
    settings = replace(PRESETS["smoke"], dtypes=("fp32",), impls=wanted)
    made, refused = run(["calibrate"], settings, tmp_path, Console(width=160))
    assert not refused and {row.impl for row in made} == set(wanted)


@pytest.mark.skipif(bool(cpu.available()), reason=f"{cpu.available()}")
def test_other_instruction_sets_and_fp16(tmp_path):
    table = io.StringIO()
    isas = tuple(cpu.isas())
    settings = replace(PRESETS["smoke"], dtypes=("fp16",), isas=isas, impls=("eager",))
    made, refused = run(["layer"], settings, tmp_path, Console(file=table, width=160))
    assert not refused
    assert {row.impl for row in made} == {"eager", *(f"reap:cpu[{isa}]" for isa in isas)}
    assert {row.dtype for row in made} == {"fp16"}
    assert all(f"reap:cpu[{isa}]" in table.getvalue() for isa in isas)


def test_price_of_norms_is_of_pairs(monkeypatch, tmp_path):
    """Calls that become slower and slower: each pair has the same ratio, medians have not."""
    made_up = itertools.count(-1)  # one call before the pairs says how long one takes

    def seconds(call, repeats, device="cpu"):
        slow = 1.25 if call.args[1] == {} else 1.0
        return slow * 2.0 ** (next(made_up) // 2) * repeats

    monkeypatch.setattr("bench.norms.seconds", seconds)
    monkeypatch.setattr("bench.layer.executed", lambda given, **o: partial(_reference, given, o))
    monkeypatch.setattr("bench.norms.cpu.available", lambda: None)
    said: list[str] = []
    settings = replace(PRESETS["smoke"], dtypes=("fp32",), tokens=(3,), say=said.append)
    (ours, _), _ = run(["norms"], settings, tmp_path, Console(width=160))
    assert ours.speedup_vs["cpu, norms off"] == pytest.approx(0.8)
    assert any("cost +25.00%" in line for line in said)


def _reference(given, _options):
    return reap_kernels.moe_saliency(**given, backend="reference")


def test_gate_fetches_only_chosen_experts():
    """A token's truth does not depend on experts that it did not choose."""
    given = inputs.weights(TINY, torch.float32) | inputs.routed(TINY, 3, torch.float32)
    few = gate.chosen_experts(given)
    assert len(few["gate_up_proj"]) == len(given["top_k_index"].unique()) < TINY.E
    for mine, whole in zip(gate.cases().truth(few), gate.cases().truth(given), strict=True):
        assert torch.equal(mine, whole)


def test_roofs_of_a_gpu_are_its_makers():
    h100, shape = "NVIDIA H100 80GB HBM3", REAL["qwen3-30b-a3b"]
    gpu = device.known(h100)
    assert gpu is not None and gpu.flops == 989e12
    assert device.known("NVIDIA GeForce GTX 1080") is None
    assert device.floor_ms(shape, 16384, "bf16", h100) == pytest.approx(1.25, rel=0.01)
    few = 1e3 * shape.floor_bytes(1, "bf16") / 3.35e12  # bound by memory
    assert device.floor_ms(shape, 1, "bf16", h100) == pytest.approx(few)
    assert device.floor_ms(shape, 1, "fp32", h100) is None
    assert device.floor_ms(shape, 1, "bf16", "another") is None


def test_interleave_takes_turns(monkeypatch):
    turns: list[str] = []
    monkeypatch.setattr("bench.measure.SAMPLE_SECONDS", 0.0)
    impls: dict[str, Callable[[], object]] = {name: partial(turns.append, name) for name in "abc"}
    samples = interleave(impls, None, Settings(rounds=4, seconds=60.0))
    assert all(len(ms) == 4 for ms in samples.ms.values())
    assert [sorted(turns[i : i + 3]) for i in range(0, 12, 3)] == [list("abc")] * 4
    assert len({turns[i] for i in range(0, 12, 3)}) == 3, "the first of a round changes"


def test_rows_from_samples():
    samples = Samples({"reap:x": [1.0, 2.0, 9.0], "peer": [4.0]}, [1e9, 4e9, 2e9])
    ours, peer = rows("layer", ("bf16", "tiny", 7), samples, flops=2_000_000, extra={"peer": 5})
    assert (ours.ms_median, peer.ms_median) == (2.0, 4.0)
    assert (ours.ms_p20, ours.ms_p80) == pytest.approx((1.4, 6.2))
    assert ours.gflops == pytest.approx(1.0) and ours.fraction_of_peak == pytest.approx(0.5)
    assert ours.speedup_vs == {"peer": 2.0} and peer.speedup_vs == {}
    assert (ours.extra_bytes, peer.extra_bytes) == (None, 5)
    assert asdict(ours).keys() == set(COLUMNS)


def test_floors_by_hand():
    shape = Shape("x", 4, 2, 8, 16)
    assert shape.flops(3) == 2 * 3 * 2 * (8 * 16 * 3)  # 6 slots, three projections of 8 x 16
    assert shape.weight_bytes("bf16") == 2 * 4 * 3 * 8 * 16
    # One token hits 2 of 4 experts; in and out are 8 elements each.
    assert shape.floor_bytes(1, "fp32") == 4 * (2 * 3 * 8 * 16 + 2 * 8)
    assert Shape.parse(str(shape)) == shape


def test_a_layer_is_scaled_in_experts_and_says_so():
    real = REAL["kimi-k2"]
    fitted = real.fit("bf16", 10 << 30)
    assert fitted is not None
    assert fitted.weight_bytes("bf16") <= 10 << 30 < 2 * fitted.weight_bytes("bf16")
    assert (fitted.of, fitted.K, fitted.H, fitted.I) == (384, real.K, real.H, real.I)
    assert "E96(of 384)" in str(fitted) and Shape.parse(str(fitted)) == fitted
    assert real.fit("bf16", 1 << 20) is None


def test_peak_extra_sees_what_is_freed_before_the_end():
    def call():
        torch.ones(25 << 20)  # 100 MiB
        return torch.ones(5 << 20)

    result, extra = memory.peak_extra(call)
    if extra is None:
        pytest.skip("this kernel has no resettable high-water mark")
    assert result.numel() == 5 << 20
    assert 99 << 20 <= extra < 130 << 20  # resident pages are counted in batches


@ROOFED
@pytest.mark.slow
def test_roofs_are_above_what_torch_reaches():
    """The best of many short tries of each, in turn: neighbours may take the processor away."""
    x = torch.randn(512, 512)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times, peaks = [], []
        for _ in range(30):
            start = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - start)
            peaks.append(roof.fma_peak("fp32", 1, 0.002))
    finally:
        torch.set_num_threads(threads)
    assert max(peaks) > 0.7 * 2 * 512**3 / min(times)
    assert roof.read_bandwidth(torch.ones(1 << 22), 1) > 1e8


def test_line_of_a_row(smoke):
    row = next(row for row in smoke[0] if row.bench == "layer" and row.impl == "eager")
    assert report.line(row).startswith(f"layer {row.dtype} tiny E8 K2 H64 I48 T={row.T} eager ")


@pytest.mark.parametrize("kind", [peers.Hooks, peers.Observer])
def test_a_peer_and_its_weights_go_at_once(kind):
    """The next layer is fitted to the memory that is there, and a cycle with gigabytes would wait
    for a collector that counts objects."""
    weights = inputs.weights(TINY, torch.float32)
    given = inputs.routed(TINY, 3, torch.float32) | weights
    gc.disable()
    try:
        module = kind(*weights.values())
        layer.peer(module, given)()
        gone = weakref.ref(module)
        del module
        assert gone() is None
    finally:
        gc.enable()


def test_even_routing_gives_every_expert_as_many_slots():
    ids = inputs.routed(TINY, 40, torch.float32, routing="even")["top_k_index"]
    assert ids.flatten().bincount().tolist() == [10] * TINY.E
    assert all(len(set(row)) == TINY.K for row in ids.tolist())
    assert ids.tolist() != sorted(ids.tolist())


def test_gpt_oss_has_a_layout_of_its_own():
    """Through the gate, in fp32: the biases and the layout are those that both sides see."""
    shape = replace(TINY, name="own", own=True)
    with torch.inference_mode():
        given = inputs.routed(shape, 5, torch.float32) | inputs.weights(shape, torch.float32)
        assert given["transposed"] and given["interleaved"] and given["down_bias"] is not None
        gate.check("ours", reap_kernels.moe_saliency(**given, backend="reference"), given)
    said: list[str] = []
    settings = replace(PRESETS["smoke"], shapes=(shape,), dtypes=("fp32",), say=said.append)
    assert {row.impl for row in layer.run(settings)} <= set(layer.OURS)
    assert "layer: no peers for own, they have another layout" in said


def test_both_routings_are_rows():
    settings = replace(
        PRESETS["smoke"], dtypes=("fp32",), routings=inputs.ROUTINGS, impls=("reap:reference",),
        say=lambda line: None,
    )  # fmt: skip
    assert [(row.T, row.routing) for row in layer.run(settings)] == [
        (1, "uniform"), (40, "uniform"), (40, "even"),  # one token has too few slots for all
    ]  # fmt: skip


def test_bmm_is_both_products_of_as_many_rows():
    weights = inputs.weights(TINY, torch.float32)
    module = peers.Bmm(*weights.values())
    given = inputs.routed(TINY, 40, torch.float32)
    assert layer.peer(module, given)().shape == (TINY.E, 10, TINY.H)
    assert module.rows is not None and module.rows[1].shape == (TINY.E, 10, TINY.I)


def test_a_peer_that_has_no_room_is_a_line(monkeypatch):
    monkeypatch.setattr("bench.memory.available", lambda device: 10**9)
    assert "it needs" in str(layer._unbearable("batched_mm", REAL["mixtral-8x7b"], 64, "bf16", ""))
    assert layer._unbearable("bmm", TINY, 1, "bf16", "") == "there are fewer slots than experts"
    assert layer._unbearable("eager", TINY, 1, "bf16", "") is None


def test_no_matplotlib_no_plots(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said: list[str] = []
    settings = replace(
        PRESETS["smoke"], dtypes=("fp32",), impls=("reap:reference",), say=said.append
    )
    run(["layer"], settings, tmp_path, Console(file=io.StringIO(), width=160))
    assert "no plots: matplotlib is not installed" in said
