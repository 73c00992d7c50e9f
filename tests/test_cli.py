"""The command line end to end on the shipped model, and every mistake a user can make with it."""

import contextlib
import json
import math
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from mtps import saved_with_mtp
from typer.testing import CliRunner

from reap.app.cli import app
from reap.app.commands.calibration import PARTIAL
from reap.app.commands.scores import _ranked
from reap.app.console import print_table, reports_errors
from reap.errors import ReapError
from reap.model import compat
from reap.statistics.stats import Statistics
from reap.text import batching
from reap.versions import TESTED, releases

MODEL = Path(__file__).parent.parent / "models" / "tiny-qwen3-moe"
# For minutes, up to the name of its output.
CALIBRATE: list[str | Path] = [sys.executable, "-m", "reap", "calibrate", MODEL]
CALIBRATE += ["--data", "stdlib:code", "--out"]


def invoke(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def run_json(*arguments: object) -> dict:
    code, out, err = invoke(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def refused(*arguments: object) -> str:
    """The one line with which a user's mistake is refused."""
    code, out, err = invoke(*arguments)
    assert code == 2, (code, out, err)
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("reap: "), err
    assert "Traceback" not in err
    return lines[0]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a first session leaves: sources, code and prose statistics, a plan."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "empty").mkdir()
    (folder / "a.txt").write_text("def f(x):\n    return x + 1\n" * 400)
    for name in ("one", "two"):
        calibrate(folder, name)
    invoke("plan", folder / "one.st", "--ratio", 0.5, "--out", folder / "plan.json")
    invoke("plan", folder / "one.st", "--ratio", 0, "--out", folder / "all.json")
    return folder


def calibrate(folder: Path, name: str) -> None:
    arguments = (
        "--data",
        folder / "a.txt",
        "--max-tokens",
        512,
        "--seq-len",
        64,
        "--batch-size",
        2,
    )
    code, _, err = invoke(
        "calibrate", MODEL, *arguments, "--domain", name, "--out", f"{folder}/{name}.st"
    )
    assert code == 0, err


@pytest.fixture(scope="module")
def pruned(work: Path) -> Path:
    code, _, err = invoke("prune", MODEL, work / "plan.json", work / "pruned")
    assert code == 0, err
    return work / "pruned"


def test_help_does_not_import_torch():
    """`reap --help` answers at once: the slow imports wait until a command needs them."""
    code = "import sys, reap.__main__, reap.app.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert "calibrate" in invoke("--help")[1]


def test_score_lists_every_expert_of_every_layer(work):
    printed = run_json("score", work / "one.st", "--criterion", "frequency")
    assert printed["tokens"] == 512
    for layer in printed["layers"].values():
        assert layer["scores"] == layer["counts"]
    assert invoke("score", work / "one.st")[1].count("experts") == len(printed["layers"])


def test_a_table_is_never_cut(monkeypatch, capsys):
    """Not to a terminal's width, which would cost figures, and not of names that look like
    markup."""
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_table("[bold] title", ["layer", "a long heading"], [["[0] name of a layer", "1: 2.345"]])
    printed = capsys.readouterr().out
    assert "…" not in printed
    for text in ("[bold] title", "[0] name of a layer", "a long heading", "1: 2.345"):
        assert text in printed


def test_ascii_terminal(work):
    """What the encoding of stdout does not know is escaped; JSON is ASCII everywhere."""
    (work / "caf\u00e9.txt").write_text("some words " * 50)
    options = ("evaluate", str(MODEL), "--data", str(work / "caf\u00e9.txt"), "--max-tokens", "64")
    for more in ((), ("--json",)):
        result = CliRunner(charset="ascii").invoke(app, [*options, *more])
        assert result.exit_code == 0, result.output
    assert "caf\u00e9" in json.loads(result.output)
    result = CliRunner(charset="ascii").invoke(app, ["score", str(work / "one.st")])
    assert result.exit_code == 0 and "\\xb1" in result.stdout


def test_closed_pipe_is_quiet(work):
    """`reap score ... | head`: nobody reads on, and that is no error of ours."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "reap", "score", str(work / "one.st"), "--json"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == "" and done.returncode == 1


def test_two_experts_have_a_score_in_every_column():
    row = _ranked(torch.tensor([2.0, 1.0]), torch.tensor([0.5, math.nan]))
    assert row == ["1: 1", "0: 2 ± 0.5", "0: 2 ± 0.5", "0: 2 ± 0.5", "0: 2 ± 0.5"]


@pytest.mark.parametrize(
    "error, code, line",
    [
        (PermissionError(13, "Permission denied", "x"), 2, "reap: x: Permission denied"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "--batch-size"),
        (OSError("odd"), 1, "internal error: OSError: odd"),
        (RuntimeError("two\nlines"), 1, "internal error: RuntimeError: two lines"),
    ],
)
def test_exit_codes(error, code, line, capsys):
    @reports_errors
    def command():
        raise error

    with pytest.raises(typer.Exit) as exit:
        command()
    assert exit.value.exit_code == code
    printed = capsys.readouterr().err
    assert line in printed and printed.count("\n") == 1


def test_combine_adds_exactly(work):
    printed = run_json("combine", work / "one.st", work / "two.st", "--out", work / "both.st")
    assert printed["tokens"] == 1024
    assert sorted(printed["domains"]) == ["one", "two"]
    one = run_json("score", work / "one.st", "--criterion", "weighted_ean")["layers"]
    both = run_json("score", work / "both.st", "--criterion", "weighted_ean")["layers"]
    for layer, values in both.items():
        assert values["scores"] == [2 * score for score in one[layer]["scores"]]
    alone = run_json("score", work / "both.st", "--criterion", "weighted_ean", "--domain", "one")
    assert alone["layers"] == one and alone["tokens"] == 512
    out = work / "two.json"
    invoke("plan", work / "both.st", "--domain", "two", "--keep", 4, "--out", out)
    assert json.loads(out.read_text())["calibration"]["domains"] == {"two": 512}


def test_plan_prune_evaluate(work, pruned):
    plan = json.loads((work / "plan.json").read_text())
    config = json.loads((MODEL / "config.json").read_text())
    kept = {len(layer["kept"]) for layer in plan["layers"].values()}
    assert kept == {config["num_experts"] // 2}
    assert json.loads((pruned / "config.json").read_text())["num_experts"] == kept.pop()
    data = ("--data", work / "a.txt", "--max-tokens", 256, "--seq-len", 64)
    same = run_json("evaluate", MODEL, *data, "--teacher", MODEL)["total"]
    assert same["kl"] == pytest.approx(0, abs=1e-6) and same["agreement"] == 1
    changed = run_json("evaluate", pruned, *data, "--teacher", MODEL)["total"]
    assert changed["kl"] > 0.01 and changed["agreement"] < 1
    assert changed["tokens"] == same["tokens"]


def test_doctor_gives_every_backend_a_reason_or_none():
    found = run_json("doctor")
    assert found["backends"]["reference"] is None
    assert found["versions"]["torch"]
    lines = invoke("doctor")[1].splitlines()
    for name in ("triton", "cuda", "cuda_sm90"):  # what ran on few GPUs says on which
        (line,) = [line for line in lines if line.startswith(f"backend {name} ")]
        assert found["caveats"][name] in line and "an H100" in line
    assert "backend reference  available" in lines


def test_doctor_says_what_a_release_changed(monkeypatch, request):
    request.addfinalizer(compat._fault.cache_clear)
    found = run_json("doctor")
    assert found["tested"] == {name: list(ends) for name, ends in TESTED.items()}
    assert set(found["seams"].values()) == {None}
    ranges = f"transformers {releases('transformers')}, torch {releases('torch')}"
    last = invoke("doctor")[1].splitlines()[-1]
    assert last == f"private names  all as needed; tested with {ranges}"

    monkeypatch.delattr("torch._C._current_graph_task_id")
    compat._fault.cache_clear()
    found = run_json("doctor")
    ((name, what),) = [item for item in found["seams"].items() if item[1] is not None]
    assert "_current_graph_task_id" in what and "stops observing a model: install torch" in what
    code, out, _ = invoke("doctor")
    assert code == 0 and f"changed        {name}: {what}" in out.splitlines()
    total = len(found["seams"])
    assert out.splitlines()[-1] == f"private names  1 of {total} changed; tested with {ranges}"


def test_progress_is_quiet_without_a_terminal(work):
    _, out, err = invoke("evaluate", MODEL, "--data", work / "a.txt", "--max-tokens", 128)
    assert err == "" and "\x1b" not in out


def test_a_bar_on_a_terminal_until_ctrl_c(tmp_path):
    """A pseudo-terminal as stderr: after two seconds there is a bar with tokens per second. An
    interrupt, inside the loop then, leaves a line and nothing else."""
    leader, follower = pty.openpty()
    process = subprocess.Popen([*CALIBRATE, tmp_path / "x.st"], stderr=follower)
    os.close(follower)
    seen = b""
    try:
        deadline = time.monotonic() + 180
        while b"tokens/s" not in seen and time.monotonic() < deadline:
            seen += os.read(leader, 4096)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # how a terminal ends
            while time.monotonic() < deadline:
                seen += os.read(leader, 4096)
        assert process.wait(10) == -signal.SIGINT
    finally:
        process.kill()
        process.wait()
        os.close(leader)
    assert b"tokens/s" in seen and b"reap: interrupted" in seen
    assert [path.name for path in tmp_path.iterdir()] == ["x.st.partial.safetensors"]
    assert b"x.st.partial.safetensors: the same command goes on from there" in seen


# Each line: what the user typed, and what the answer must name. {w} is the work folder.
MISTAKES = {
    "no such folder": ("calibrate {w}/nothing --data {w}/a.txt --out {w}/x.st", "does not exist"),
    "a file as model": ("calibrate {w}/a.txt --data {w}/a.txt --out {w}/x.st", "is a file"),
    "not a model folder": ("calibrate {w}/empty --data {w}/a.txt --out {w}/x.st", "no config.json"),
    "no such data": ("calibrate {m} --data {w}/no.txt --out {w}/x.st", "no.txt"),
    "existing output": ("calibrate {m} --data {w}/a.txt --out {w}/one.st", "--overwrite"),
    "a folder as output": ("calibrate {m} --data {w}/a.txt --out {w} --overwrite", "is a folder"),
    "too long a name": ("calibrate {m} --data {w}/a.txt --out {w}/" + "x" * 300, "too long"),
    "mistakes before a download": ("calibrate no/model --data {w}/no.txt --out {w}/x", "no.txt"),
    "backend before a download": (
        "calibrate no/model --data {w}/a.txt --backend quantum --out {w}/x",
        "quantum",
    ),
    "dtype before a download": ("evaluate no/model --data {w}/a.txt --dtype int3", "bfloat16"),
    "no output folder": ("calibrate {m} --data {w}/a.txt --out {w}/no/x.st", "create the folder"),
    "rows too long": (
        "calibrate {m} --data {w}/a.txt --seq-len 512 --out {w}/x.st",
        "256 positions",
    ),
    "unknown backend": (
        "calibrate {m} --data {w}/a.txt --backend quantum --out {w}/x.st",
        "quantum",
    ),
    "unknown gates": ("calibrate {m} --data {w}/a.txt --gates odd --out {w}/x.st", "renormalized"),
    "unknown dtype": ("calibrate {m} --data {w}/a.txt --dtype int3 --out {w}/x.st", "bfloat16"),
    "not statistics": ("score {w}/a.txt", "a.txt"),
    "no such domain": ("score {w}/one.st --domain two", "there is one"),
    "no statistics": ("score {w}/none.st", "none.st"),
    "unknown criterion": ("score {w}/one.st --criterion best", "weighted_ean"),
    "no ratio, no keep": ("plan {w}/one.st --out {w}/x.json", "ratio"),
    "ratio and keep": ("plan {w}/one.st --ratio 0.5 --keep 8 --out {w}/x.json", "keep"),
    "ratio of all": ("plan {w}/one.st --ratio 1 --out {w}/x.json", "ratio"),
    "fewer than top-k": ("plan {w}/one.st --keep 1 --out {w}/x.json", "picks 2 per token"),
    "not a plan": ("prune {m} {w}/a.txt {w}/x", "a.txt"),
    "statistics twice": (
        "combine {w}/one.st {w}/../{n}/one.st --out {w}/x.st",
        "the same statistics",
    ),
    "data twice": (
        "calibrate {m} --data {w}/a.txt --data {w}/a.txt --out {w}/x.st",
        "give it once",
    ),
    "existing folder": ("prune {m} {w}/plan.json {w}/empty", "--overwrite"),
    "a folder with the plan": ("prune {m} {w}/plan.json {w} --overwrite", "holds {w}/plan.json"),
    "the model as output": ("prune {m} {w}/plan.json {m} --overwrite", "which is read"),
    "data as output": (
        "calibrate {m} --data {w}/a.txt --out {w}/a.txt --overwrite",
        "is {w}/a.txt, which is read",
    ),
    "weights as output": (
        "calibrate {m} --data {w}/a.txt --out {m}/model.safetensors --overwrite",
        "lies in {m}",
    ),
    "statistics as plan": ("plan {w}/one.st --keep 8 --out {w}/one.st --overwrite", "is read"),
    "other statistics as plan": (
        "plan {w}/one.st --keep 8 --out {w}/two.st --overwrite",
        "two.st: it is not a plan of ours",
    ),
    "a sum over its summand": (
        "combine {w}/one.st {w}/two.st --out {w}/two.st --overwrite",
        "is {w}/two.st",
    ),
    "a plan as sum": ("combine {w}/one.st --out {w}/plan.json --overwrite", "not statistics"),
    "nothing to drop": ("prune {m} {w}/all.json {w}/x", "drops no expert"),
    "a demo in its model": ("demo --out {m}/demo", "lies in {m}"),
    "combine with nothing": ("combine {w}/none.st --out {w}/x.st", "none.st"),
    "teacher is missing": ("evaluate {m} --data {w}/a.txt --teacher {w}/none", "none"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line(work, mistake):
    line, named = MISTAKES[mistake]
    before = sorted(path.name for path in work.iterdir())
    arguments = line.format(w=work, m=MODEL, n=work.name).split()
    assert named.format(w=work, m=MODEL) in refused(*arguments)
    assert sorted(path.name for path in work.iterdir()) == before


def test_dense_model_is_refused(tmp_path):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    line = refused(
        "calibrate", tmp_path / "model", "--data", "stdlib:code", "--out", tmp_path / "x.st"
    )
    assert "llama" in line


def test_truncated_weights_are_refused_before_loading(work, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    line = refused("calibrate", folder, "--data", work / "a.txt", "--out", tmp_path / "x.st")
    assert "model.safetensors" in line
    assert "model.safetensors" in refused("prune", folder, work / "plan.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nan_weights_name_layer_and_expert(work, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if ".layers.1." in n and ".experts.3.down_proj" in n)
    weights[name][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    arguments = ("--data", work / "a.txt", "--seq-len", 64, "--out", tmp_path / "x.st")
    line = refused("calibrate", folder, *arguments)
    assert "layers.1" in line and "expert 3" in line
    assert not (tmp_path / "x.st").exists()


def test_an_interrupted_run_goes_on(work, tmp_path, monkeypatch):
    """After a late error of any kind the same command has the bits of a run in one, and another
    command is refused before the model loads."""
    data = ("--data", work / "a.txt", "--seq-len", 64, "--max-tokens", 1024)
    command = ("calibrate", MODEL, *data, "--out", tmp_path / "x.st")
    kept = tmp_path / "x.st.partial.safetensors"
    run_json("calibrate", MODEL, *data, "--out", tmp_path / "whole.st")
    monkeypatch.setattr("reap.runs.partial._SHARE", math.inf)  # every batch is remembered

    def end(number):  # as a signal would, but of the command alone
        raise typer.Exit(2)

    monkeypatch.setattr("reap.app.console.die_of", end)
    left = "what was measured so far, {} tokens, is in " + str(kept) + ": the same command goes on"
    check = batching.check_ids
    for error, after, tokens in [
        (ReapError("late"), 3, 192),
        (KeyboardInterrupt(), 0, 192),
        (torch.OutOfMemoryError("late"), 9, 768),
    ]:

        def late(model, batch, error=error, countdown=iter(range(after, -1, -1))):  # noqa: B008
            if next(countdown) == 0:
                raise error
            check(model, batch)

        monkeypatch.setattr("reap.runs.calibration.check_ids", late)
        assert left.format(tokens) in refused(*command)
    monkeypatch.setattr("reap.runs.calibration.check_ids", check)
    partial = Statistics.load(kept)
    assert partial.tokens == 768 and partial.data[0]["partial"] == {"batches": 12}
    line = refused(*command, "--batch-size", 2)
    assert "batch_size was 1, and is 2" in line and "the same command" not in line
    line = refused(*command, "--dtype", "float32")
    assert "run was" in line and "the same command" not in line
    run_json(*command)
    assert not kept.exists()
    whole, pieces = (Statistics.load(tmp_path / name) for name in ("whole.st", "x.st"))
    assert whole.digest() == pieces.digest() and whole.data == pieces.data


def test_an_output_that_appears_meanwhile_loses_nothing(work, tmp_path, monkeypatch):
    command = ("calibrate", MODEL, "--data", work / "a.txt", "--max-tokens", 512)
    save = Statistics.save

    def late(stats, path, **options):
        if not str(path).endswith(PARTIAL):
            path.touch()
        save(stats, path, **options)

    monkeypatch.setattr(Statistics, "save", late)
    monkeypatch.setattr("reap.runs.partial._SHARE", math.inf)
    line = refused(*command, "--out", tmp_path / "x.st")
    assert "exists" in line and "512 tokens, is in" in line
    monkeypatch.undo()
    assert run_json(*command, "--out", tmp_path / "x.st", "--overwrite")["tokens"] == 512


def test_bad_rows_are_refused_before_the_model_loads(work, tmp_path, monkeypatch):
    rows = [{"text": "def f(x): return x"}] * 3 + [{"words": "?"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for command in ("evaluate", "calibrate"):
        more = ("--out", tmp_path / "x.st") if command == "calibrate" else ()
        arguments = (command, MODEL, "--data", tmp_path / "a.jsonl", *more)
        code, out, _ = invoke(*arguments, "--skip-bad")
        assert code == 0 and "a.jsonl: 1 row left out as bad" in out and "line 4" in out
        assert "2 rows used that came before" in out
        with monkeypatch.context() as patch:
            patch.setattr("reap.model.load.load_model", None)
            assert "line 4" in refused(*arguments, *(["--overwrite"] if more else []))
    noted = run_json(*arguments, "--skip-bad", "--overwrite")["notes"]
    assert len(noted) == 1 and "line 4" in noted[0]
    (data,) = Statistics.load(tmp_path / "x.st").data
    assert data["run"]["dtype"] == "bfloat16" and data["run"]["device"] == "cpu"
    assert data["batch_size"] == 1 and not data["run"]["deterministic"]


def test_debug_shows_the_traceback(work):
    result = CliRunner().invoke(app, ["--debug", "score", str(work / "none.st")])
    assert result.exit_code != 0 and result.exception is not None
    assert "none.st" in str(result.exception)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_torch_is_imported_leaves_nothing(tmp_path, number):
    process = subprocess.Popen([*CALIBRATE, tmp_path / "x.st"], stderr=subprocess.PIPE, text=True)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == -number
    assert err.strip().startswith("reap: interrupted") and len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_a_loop_of_the_shell(tmp_path):
    """A shell goes on after an exit code, whichever, but not after a signal's death."""
    command = " ".join(map(str, [*CALIBRATE, tmp_path / "x.st"]))
    loop = f"for i in 1 2; do echo run $i; {command}; done; echo end"
    process = subprocess.Popen(
        ["bash", "-c", loop],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    time.sleep(4)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out == "run 1\n" and err.count("reap: interrupted") == 1


def test_a_full_stdout_is_no_error_of_ours(work):
    for json_too in ([], ["--json"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "reap", "score", str(work / "one.st"), *json_too],
                stdout=full, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr == "reap: cannot write to stdout: No space left on device\n"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("score {w}/none.st --json", "none.st"),
        ("plan {w}/one.st --ratio 1 --out {w}/x.json --json", "ratio"),
        ("plan {w}/one.st --json", "stderr"),  # no --out
        ("scores --json", "stderr"),
    ],
)
def test_json_is_one_document_also_of_errors(work, line, named):
    command = [sys.executable, "-m", "reap", *line.format(w=work).split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr
    document = json.loads(done.stdout)
    assert list(document) == ["error"] and named in document["error"]


@pytest.mark.sweep
def test_names_that_are_not_utf_8(work, tmp_path):
    """Any bytes but / and 0 are a name on Linux; what cannot be said in UTF-8 is escaped."""
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    for command in (
        ["plan", work / "one.st", "--keep", "8", "--out", folder + b"/plan.json"],
        ["prune", MODEL, folder + b"/plan.json", folder + b"/out", "--json"],
        ["verify", folder + b"/out"],
        ["score", folder + b"/none.st"],
    ):
        done = subprocess.run([sys.executable, "-m", "reap", *command], capture_output=True)
        assert done.returncode == (2 if command[0] == "score" else 0), done.stderr
        assert b"internal error" not in done.stderr
        if "--json" in command:
            assert os.fsencode(json.loads(done.stdout)["out"]) == folder + b"/out"


def test_a_bottomless_config(work, tmp_path):
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    config = (folder / "config.json").read_text().rstrip().removesuffix("}")
    deep = "[" * 300 + "]" * 300
    (folder / "config.json").write_text(config + f', "deep": {deep}}}')
    arguments = ("--data", work / "a.txt", "--out", tmp_path / "x.st")
    assert "nested too deeply" in refused("calibrate", folder, *arguments)
    assert "nested too deeply" in refused("prune", folder, work / "plan.json", tmp_path / "out")


def test_info_says_what_a_path_is(work, pruned):
    stats = run_json("info", work / "one.st")
    assert (stats["kind"], stats["tokens"], stats["domains"]) == ("statistics", 512, {"one": 512})
    assert stats["experts"] == [16] and stats["versions"]["torch"]
    plan = run_json("info", work / "plan.json")
    assert (plan["kind"], plan["kept"], plan["tokens"]) == ("plan", [8], 512)
    for path in (pruned, pruned / "reap.json"):
        model = run_json("info", path)
        assert (model["kind"], model["experts"], model["criterion"]) == (
            "pruned model",
            [8],
            "reap",
        )
        assert model["base_model"] == MODEL.name
    assert run_json("info", MODEL)["kind"] == "model"
    for path in (work / "one.st", work / "plan.json", pruned, MODEL):
        assert f"kind         {run_json('info', path)['kind']}" in invoke("info", path)[1]
    assert "neither statistics nor a plan" in refused("info", work / "a.txt")
    assert "no config.json" in refused("info", work / "empty")


def test_h_is_help():
    assert invoke("-h")[1] == invoke("--help")[1]
    assert invoke("prune", "-h")[1] == invoke("prune", "--help")[1]


def test_multi_token_prediction(tmp_path: Path) -> None:
    """From calibration to the pruned model, with the layer and without; each says what it does."""
    model = tmp_path / "model"
    made = saved_with_mtp(model, "glm4_moe", vocab_size=8192)
    for file in MODEL.glob("*token*"):
        shutil.copy(file, model)
    assert run_json("info", model)["mtp"] == "model.layers.4"
    few = ("--data", "stdlib:code", "--max-tokens", 200, "--seq-len", 20)
    for option, layers, said in (
        ("--mtp", 4, ": model.layers.4 counted too, `reap prune` will keep it"),
        ("--no-mtp", 3, " is left out, `reap prune` will drop it: --no-mtp"),
    ):
        stats, plan, out = (tmp_path / f"{name}{option}" for name in ("stats", "plan", "out"))
        told = run_json("calibrate", model, *few, "--out", stats, option)
        assert told["layers"] == layers and told["notes"] == [f"multi-token prediction{said}"]
        run_json("plan", stats, "--keep", 4, "--out", plan)
        report = run_json("prune", model, plan, out)
        assert bool(report["mtp_layers"]) == (option == "--mtp") != bool(report["dropped_layers"])
        found = run_json("verify", out, "--source", model)
        assert (made.names.experts in found["experts"]) == (option == "--mtp")
    assert run_json("info", out)["mtp"] == "none with experts"
