"""`make gpu` without a GPU: stages that fail, hang and die, tests in processes that die, the table,
and what a sanitizer's log says."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import nvcc
import pytest
from rich.console import Console
from typer.testing import CliRunner

from bench.gpu import __main__ as gpu
from bench.gpu import build, facts, sanitize, small, stages, table, tests, warm
from bench.gpu.stages import Report, Stage

TESTS = Path(__file__).parent


def python(name: str, code: str, limit: float = 20, **options) -> Stage:
    return Stage(name, [sys.executable, "-S", "-c", code], limit, **options)


def run(chosen, tmp_path, seconds=60.0):
    report = Report(tmp_path / "gpu.json")
    said: list[str] = []
    wrong = stages.run(chosen, report, tmp_path / "logs", seconds=seconds, say=said.append)
    assert json.loads((tmp_path / "gpu.json").read_text()) == report.content
    return report.stages, wrong, said


def test_a_stage_that_fails_or_hangs_costs_its_own_results(tmp_path):
    rows = tmp_path / "rows"
    write = f'open({str(rows)!r}, \'w\').write(\'{{"a": 1}}\\n{{"a": 2}}\\n{{"torn\');'
    chosen = [
        python("good", "print('fine')"),
        python("fails", "import sys; print('because'); sys.exit(3)"),
        python("needs it", "", needs=("fails",)),
        python("hangs", write + "import time; time.sleep(60)", limit=1.0, result=rows),
        python("killed", "import os; os.kill(os.getpid(), 9)"),
        Stage("no program", ["/nowhere/at/all"], 5),
        python("still runs", "import os; print(os.environ['WORD'])", env={"WORD": "x"}),
    ]
    found, wrong, said = run(chosen, tmp_path)
    assert wrong == ["fails", "needs it", "hangs", "killed", "no program"]
    states = [outcome["state"] for outcome in found.values()]
    assert states == ["ok", "failed", "skipped", "timeout", "failed", "failed", "ok"]
    assert found["fails"]["code"] == 3 and "because" in found["fails"]["tail"]
    assert found["needs it"]["why"] == "needs fails"
    assert found["hangs"]["result"] == [{"a": 1}, {"a": 2}], "what it had found is kept"
    assert found["killed"]["code"] == -9
    assert any("because" in line for line in said)


def test_what_a_stage_started_ends_with_it(tmp_path):
    pid = tmp_path / "pid"
    code = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"open({str(pid)!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    _, wrong, _ = run([python("parent", code, limit=3.0)], tmp_path)
    assert wrong == ["parent"]
    for _ in range(200):
        if not _alive(int(pid.read_text())):
            return
        time.sleep(0.02)
    raise AssertionError("the child of a stage outlived it")


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_two_stages_side_by_side_and_a_limit_for_all(tmp_path, monkeypatch):
    """Each of the first two waits for the other; the clock is set by hand where a stage ends."""
    meets = "import os, time\nopen({!r}, 'w')\nwhile not os.path.exists({!r}): time.sleep(0.01)"
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    chosen = [
        python("a", meets.format(one, other), beside=True),
        python("b", meets.format(other, one)),
        python("c", "import time; time.sleep(60)"),
        python("d", ""),
    ]
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(stages, "time", clock)

    def say(line: str) -> None:
        clock.now = {"b: ok, 0.0 s": 99.0, "c: timeout, 0.0 s": 99.5}.get(line, clock.now)

    report = Report(tmp_path / "gpu.json")
    wrong = stages.run(chosen, report, tmp_path / "logs", seconds=100.0, say=say)
    found = report.stages
    assert wrong == ["c", "d"] and clock.now == 99.5
    assert found["c"]["state"] == "timeout" and found["c"]["limit"] == 1.0
    assert found["d"]["why"] == "no time is left"


def words(stage: Stage, **states) -> list[str]:
    before = {f"small {name}": {"state": state} for name, state in states.items()}
    return list(stage.command(before) if callable(stage.command) else stage.command)


def test_stages_of_make_gpu_name_what_there_is(tmp_path):
    from bench.__main__ import SHAPES, SUITES
    from bench.calibrate import FORWARDS
    from bench.layer import IMPLS

    chosen = gpu.plan(tmp_path, "cuda")
    names = [stage.name for stage in chosen]
    assert names[:3] == ["facts", "build", "warm"] and "tests" in names
    for stage in chosen:
        assert importlib.util.find_spec(words(stage)[2]) is not None
        assert set(stage.needs) <= set(names[: names.index(stage.name)])
        if words(stage)[2] == "bench":
            assert words(stage)[3] in SUITES
            for option, known in (("--impls", IMPLS + FORWARDS), ("--shapes", SHAPES)):
                if option in words(stage):
                    given = words(stage)[words(stage).index(option) + 1]
                    assert set(given.split(",")) <= set(known)


def test_a_backend_that_ends_its_process_is_not_timed(tmp_path):
    (layer,) = (stage for stage in gpu.plan(tmp_path, "cuda") if stage.name == "layer")
    impls = words(layer, cuda="failed", triton="ok")[-1].split(",")
    assert not {"reap:cuda", "reap:cuda+det"} & set(impls)
    assert {"reap:triton+det", "reap:cuda_sm90", "grouped_mm"} <= set(impls)
    assert "reap:cuda_sm90+pingpong" in impls
    assert "reap:cuda_sm90" not in words(layer, cuda_sm90="failed")[-1]


def test_make_gpu_on_a_cpu(tmp_path):
    """Without the stages that take long here: a run from its first line to its table."""
    out = ["--device", "cpu", "--smoke", "--out", str(tmp_path)]
    done = CliRunner().invoke(gpu.app, [*out, "--only", "facts"])
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.rglob("gpu.json")
    content = json.loads(path.read_text())
    assert content["wrong"] == [] and content["stages"]["facts"]["result"]["versions"]["torch"]
    done = CliRunner().invoke(gpu.app, [*out, "--only", "nonsense"])
    assert done.exit_code == 2 and "it must be one of facts, build" in done.output


@pytest.fixture
def suite(tmp_path):
    """A folder of tests for GPUs, some of which end their process."""
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_a.py").write_text(
        "import os, time, pytest\n"
        "pytestmark = [pytest.mark.gpu]\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert 1 == 2, 'plainly'\n"
        "def test_breaks_the_context(): raise RuntimeError('CUDA error: device-side assert')\n"
        "def test_dies(): os.abort()\n"
        "@pytest.mark.parametrize('n', range(6), ids=lambda n: f'case {n}')\n"
        "def test_many(n): pass\n"
        "def test_skips(): pytest.skip('no such chip')\n"
    )
    (folder / "test_b.py").write_text("import nothing_of_that_name\nmark.gpu\n")
    (folder / "test_c.py").write_text("raise SystemExit('has no test for a GPU')\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n slow\n")
    return folder


def test_tests_that_kill_their_process_cost_nothing_else(suite, tmp_path):
    result = tmp_path / "tests.json"
    assert tests.main(result, 60.0, 2, suite) == 1
    found = json.loads(result.read_text())
    assert found["counts"] == {"passed": 7, "failed": 2, "crashed": 1, "skipped": 1, "error": 1}
    wrong = {line["test"].rpartition("::")[2]: line for line in found["wrong"]}
    assert "plainly" in wrong["test_fails"]["message"]
    assert "died with -6" in wrong["test_dies"]["message"]
    assert "nothing_of_that_name" in wrong["tests/test_b.py"]["message"]
    assert "no such chip" in " ".join(found["skipped"])


def test_a_test_that_hangs_is_told(suite, tmp_path):
    (suite / "test_a.py").write_text(
        "import time, pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_passes(): pass\n"
        "def test_hangs(): time.sleep(600)\n"
    )
    (suite / "test_b.py").unlink()
    result = tmp_path / "tests.json"
    assert tests.main(result, 6.0, 1, suite) == 1
    found = json.loads(result.read_text())
    assert found["counts"] == {"passed": 1, "crashed": 1}
    assert "still ran at the end of the time" in found["wrong"][0]["message"]


def test_tests_for_a_gpu_wait_for_no_compiler():
    spec = importlib.util.spec_from_file_location("of_tests", TESTS / "conftest.py")
    assert spec is not None and spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)

    def item(module, marked):
        return SimpleNamespace(module=module, get_closest_marker=lambda name: marked or None)

    items = [item("a", False), item("a", True), item("b", True), SimpleNamespace()]
    assert conftest.to_prepare(items) == ["a"]


def test_no_file_with_a_test_for_a_gpu_needs_what_is_optional():
    """By their imports, and those of the files beside them."""
    seen, left = set(), tests.files(TESTS)
    assert {Path(path).name for path in left} >= {"test_cuda_gpu.py", "test_triton.py"}
    while left:
        path = Path(left.pop())
        seen.add(path.name)
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                assert words[1].partition(".")[0] not in facts.OPTIONAL, f"{path.name}: {line}"
                beside = TESTS / f"{words[1]}.py"
                if beside.exists() and beside.name not in seen:
                    left.append(str(beside))


def test_facts_name_what_is_missing(monkeypatch):
    monkeypatch.setattr(facts, "_has", lambda name: name != "safetensors")
    monkeypatch.setattr(facts, "program", lambda name: None if name == "nvcc" else name)
    assert facts.missing() == [
        "safetensors: nothing runs",
        "nvcc: cuda and cuda_sm90 are not built",
    ]


def test_a_build_that_leaves_an_extension_out_is_wrong(monkeypatch, tmp_path):
    assert build.arch(90) == "sm_90a" and build.arch(80) == "sm_80"
    commands = []

    def fake(command, env=None, **_):
        commands.append((command, env))
        missing = "'_cuda'" in command[-1]
        return SimpleNamespace(returncode=int(missing), stderr="the CUDA extension is not built")

    monkeypatch.setattr(build.subprocess, "run", fake)
    monkeypatch.setattr(facts, "gpu", lambda: {"sm": 90})
    result = tmp_path / "build.json"
    assert build.main("cuda", result) == 1
    assert commands[0][1]["REAP_CUDA_ARCHS"] == "sm_90a"
    assert json.loads(result.read_text())["wrong"] == ["_cuda: the CUDA extension is not built"]


def test_warm_up_compiles_every_layer_and_leaves_a_line_for_each(monkeypatch, tmp_path):
    shapes = {job.get("shape") for job in warm.jobs()}
    for stage in gpu.plan(tmp_path, "cuda"):
        command = words(stage)
        if "--shapes" in command:
            assert set(command[command.index("--shapes") + 1].split(",")) <= shapes
    done: list = []

    def compile(job, device):
        done.append(job)
        if "case" in job:
            raise ValueError("does not compile")

    monkeypatch.setattr(warm, "compile", compile)
    parts = [warm.work("cuda", part, 2, tmp_path / "warm") for part in range(2)]
    lines = stages.read(tmp_path / "warm")
    assert len(lines) == len(done) == len(warm.jobs())
    assert sum(parts) == sum(line["error"] is not None for line in lines) > 0


def test_a_warm_up_call_on_a_cpu():
    few = [job | {"T": 1} if "T" in job else job for job in warm.jobs()]
    for kind in ("T", "case", "small", "statistics"):
        warm.compile(next(job for job in few if kind in job), "cpu")


ROW = {
    "bench": "layer", "impl": "reap:cuda_sm90", "dtype": "bf16", "shape": "qwen3 E8 K2 H6 I4",
    "T": 4096, "routing": "even", "ms_median": 1.5, "method": "graph", "alone_ms": 1.7,
    "host_ms": 0.1, "floor_ms": 0.5, "gflops": 7e5, "extra_bytes": 5_000_000, "clock_mhz": 1980,
    "power_w": None,
    "speedup_vs": {"grouped_mm": 1.25},
    "kernels": {"void reap::cuda::down_kernel<__nv_bfloat16, 128>(x)": 0.4, "gate_up_kernel": 0.9},
}  # fmt: skip


def test_table_of_a_run_that_is_half_there():
    content = {
        "device": "cuda",
        "stages": {
            "facts": {"state": "ok", "seconds": 1, "result": {"missing": ["nvcc: not built"]}},
            "layer": {"state": "timeout", "seconds": 60, "result": ROW},
            "tests": {
                "state": "failed",
                "seconds": 9,
                "result": {
                    "counts": {"passed": 3, "failed": 1},
                    "wrong": [{"test": "tests/test_x.py::test_y[a b]", "outcome": "failed"}],
                },
            },
            "stats": {"state": "skipped", "seconds": 0, "why": "needs facts"},
        },
    }
    file = StringIO()
    table.show(content, Console(file=file, width=220))
    text = file.getvalue()
    for part in (
        "layer bf16 qwen3 T=4,096 even",
        "reap:cuda_sm90",
        "3.00",
        "1.25",
        "gate_up_kernel 0.9, down_kernel",
        "missing nvcc",
        "failed: tests/test_x.py::test_y[a b]",
        "skipped",
        "needs facts",
    ):
        assert part in text, part


def test_sanitizer_is_told_our_kernels_only():
    command = sanitize.command("/bin/cs", "racecheck", "cuda_sm90", "--kernel-name arg")
    assert command[:3] == ["/bin/cs", "--tool", "racecheck"]
    assert command[command.index("--kernel-name") + 1] == "kns=reap"
    assert sanitize.small("cuda_sm90") == [sys.executable, "-m", "bench.gpu.small", "cuda_sm90"]
    old = sanitize.filters("triton", "  --kernel-regex arg")
    assert old[:2] == ["--kernel-regex", "kns=route_kernel"]
    names = {part for part in sanitize.TRITON if part.endswith("_kernel")}
    source = "".join(path.read_text() for path in TESTS.parent.glob("reap_kernels/triton/*.py"))
    assert all(f"def {name}(" in source for name in names)


@pytest.mark.parametrize(
    ("code", "log", "state"),
    [
        (0, "done a\ndone b\nall done\n========= ERROR SUMMARY: 0 errors\n", "ok"),
        (86, "========= Invalid __global__ read of size 4\n========= ERROR SUMMARY: 2 errors\n",
         "errors"),
        (0, "done a\nall done\n========= RACECHECK SUMMARY: 3 hazards displayed\n", "errors"),
        (0, "left out a\nall done\n", "failed"),
        (1, "done a\nTraceback\n", "failed"),
        (None, "done a\n", "timeout"),
    ],
)  # fmt: skip
def test_what_a_sanitizer_found(code, log, state):
    found, line = sanitize.verdict(code, log)
    assert found == state and line
    if "Invalid" in log:
        assert "2 errors" in line and "read of size 4" in line


@pytest.mark.skipif(nvcc.missing() is not None, reason=str(nvcc.missing()))
def test_planted_faults_pass_the_filters_of_every_backend(tmp_path):
    """Of their kernel's name a filter takes a part; -Werror: no fault is optimised away unseen."""
    made = tmp_path / "planted.ptx"
    flags = ["-Werror", "all-warnings", "-arch=sm_90", "-ptx", "-o", str(made)]
    subprocess.run(["nvcc", *flags, str(sanitize.PLANTED)], check=True)
    (name,) = re.findall(r"\.entry (\w+)", made.read_text())
    for parts in sanitize.KERNELS.values():
        assert any(part in name for part in parts)
    code = made.read_text()
    assert "bar.sync" in code and code.count("st.global") >= 3 and "ld.shared" in code


MADE_UP_TOOL = """#!/bin/sh
[ $1 = --help ] && echo --kernel-name && exit
tool=$2
for last; do :; done
[ $last = $tool ] && case " $BLIND " in
*" $tool "*) echo done x; echo all done; exit;;
*) echo "========= ERROR SUMMARY: 64 errors"; exit 86;;
esac
[ $tool = racecheck ] && echo "========= RACECHECK SUMMARY: 1 hazard" && exit 86
echo done x; echo all done
"""


@pytest.mark.parametrize(("blind", "compiles"), [("", True), ("initcheck", True), ("", False)])
def test_sanitizing_from_end_to_end_with_a_made_up_tool(
    blind, compiles, monkeypatch, tmp_path, capsys
):
    """A made-up tool, which finds the planted faults if it is not blind, and a race of ours."""
    tool, compiler = tmp_path / "compute-sanitizer", tmp_path / "nvcc"
    tool.write_text(MADE_UP_TOOL)
    compiler.write_text(f"#!/bin/sh\nexit {0 if compiles else 1}\n")
    for path in (tool, compiler):
        path.chmod(0o755)
    monkeypatch.setenv("BLIND", blind)
    monkeypatch.setattr(facts, "program", lambda name: str(tmp_path / name))
    check = sanitize.check

    def checked(words, *rest):
        if words[0] == str(tool):
            return check(words, *rest)
        return {"state": "ok", "line": "1 cases", "seconds": 1, "log": ""}

    monkeypatch.setattr(sanitize, "check", checked)
    with pytest.raises(SystemExit) as ended:
        sanitize.main(tmp_path, 30.0, "cuda")
    assert ended.value.code == 1
    found = json.loads((tmp_path / "sanitize.json").read_text())
    expected = {"cuda alone": "ok"} | {f"cuda {tool}": "ok" for tool in sanitize.TOOLS}
    expected["cuda racecheck"] = "errors"
    if compiles:
        expected |= {f"cuda {tool} planted": "ok" for tool in sanitize.TOOLS}
    else:
        expected["planted"] = "failed"
    if blind:
        expected[f"cuda {blind} planted"] = "blind"
    assert {name: each["state"] for name, each in found.items()} == expected
    said = capsys.readouterr().out
    assert "1 errors" in said and ("finds the planted fault" in said) == compiles


def test_small_calls_run_and_a_missing_backend_is_told(capsys):
    assert small.main("reference", "cpu") == 0
    said = capsys.readouterr().out
    assert said.count("done ") == len(small.calls()) and "all done" in said
    if small.reap_kernels.backends()["cuda"] is not None:
        assert small.main("cuda") == 1


def test_reports_are_whole_while_they_are_written(tmp_path):
    report = Report(tmp_path / "deep/gpu.json")
    report.put("a", {"state": "ok"})
    assert json.loads(report.path.read_text()) == {"stages": {"a": {"state": "ok"}}}
    assert os.listdir(tmp_path / "deep") == ["gpu.json"]
