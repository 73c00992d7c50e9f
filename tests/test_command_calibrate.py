"""`reap calibrate`: what is refused before it begins, and what is left of what ends early."""

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from commandline import CALIBRATE, MODEL, ended, invoke, refused, run_json
from processes import program

from reap.errors import ReapError
from reap.runs.rankfiles import PARTIAL
from reap.statistics.stats import Statistics
from reap.text import batching


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
    _, line = ended("calibrate", folder, *arguments)
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
        assert left.format(tokens) in ended(*command)[1]
    monkeypatch.setattr("reap.runs.calibration.check_ids", check)
    partial = Statistics.load(kept)
    assert partial.tokens == 768 and partial.data[0]["partial"] == {"batches": 12}
    line = refused(*command, "--batch-size", 2)
    assert "--batch-size was 1, and is 2" in line and "the same command" not in line
    _, line = ended(*command, "--dtype", "float32")
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
    _, line = ended(*command, "--out", tmp_path / "x.st")
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


def test_a_bottomless_config(work, tmp_path):
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    config = (folder / "config.json").read_text().rstrip().removesuffix("}")
    deep = "[" * 300 + "]" * 300
    (folder / "config.json").write_text(config + f', "deep": {deep}}}')
    arguments = ("--data", work / "a.txt", "--out", tmp_path / "x.st")
    assert "nested too deeply" in refused("calibrate", folder, *arguments)
    assert "nested too deeply" in refused("prune", folder, work / "plan.json", tmp_path / "out")


def test_the_first_line_says_what_runs_where(work, tmp_path, monkeypatch):
    """Before the model loads, which may take minutes, and also beside a JSON document."""

    def load(*_, **__):
        raise ReapError("it would load now")

    monkeypatch.setattr("reap.model.load.load_model", load)
    options = ("--seq-len", 64, "--batch-size", 2, "--max-tokens", 512)
    command = ("calibrate", MODEL, "--data", work / "a.txt", *options, "--out", tmp_path / "x.st")
    for more in ((), ("--json",)):
        (first,), line = ended(*command, *more)
        assert line.endswith("it would load now")
        assert first.startswith(f"reap: calibrating: {MODEL}, BF16 as stored on cpu, backend auto")
        assert first.endswith("about 512 tokens in rows of 64, 2 at a time")
    kernels = ("--dtype", "float32", "--backend", "reference", "--deterministic", "--pairs")
    (first,), _ = ended(*command, *kernels, "--gates", "renormalized")
    assert "float32 on cpu, backend reference, gates renormalized, pairs, deterministic" in first


@pytest.mark.parametrize("device", ["cuda:77", "toaster"])
def test_a_device_that_is_not_there(work, tmp_path, device):
    command = ("calibrate", "no/model", "--data", work / "a.txt", "--out", tmp_path / "x.st")
    assert f"device '{device}' is not usable" in refused(*command, "--device", device)


def layer_by_layer(work: Path, out: Path, *more: object) -> tuple[int, str, str]:
    """`calibrate` as for one.st, with more options."""
    given = ("--data", work / "a.txt", "--max-tokens", 512, "--seq-len", 64, "--batch-size", 2)
    return invoke("calibrate", MODEL, *given, "--domain", "one", "--out", out, *more)


@pytest.mark.parametrize("more", [("--stream",), ("--wave-tokens", 200)])
def test_layer_by_layer(work: Path, tmp_path: Path, more: tuple[object, ...]) -> None:
    code, out, err = layer_by_layer(work, tmp_path / "x.st", *more)
    assert code == 0 and "512 tokens through 4 MoE layers, domains one" in out
    assert "calibrating: layer by layer (as asked for), 4 layers of 6.81 MB, at most " in err
    found, whole = Statistics.load(tmp_path / "x.st"), Statistics.load(work / "one.st")
    assert found.digest() == whole.digest() and found.data == whole.data
    assert [path.name for path in tmp_path.iterdir()] == ["x.st"]


def test_outputs(work: Path, tmp_path: Path) -> None:
    """The same bits layer by layer, and nothing else of the statistics changes."""
    found = []
    for name, more in (("whole", ()), ("layers", ("--stream",))):
        code, _, err = layer_by_layer(work, tmp_path / name, "--outputs", *more)
        assert code == 0 and ", outputs, " in err
        found.append(Statistics.load(tmp_path / name))
    whole, layers = found
    bare = Statistics.load(work / "one.st")
    assert whole == layers and whole.outputs and not bare.outputs
    for name in whole.layers:
        tensors, without = whole[name].tensors(), bare[name].tensors()
        assert all(torch.equal(tensors[field], without[field]) for field in without)
        mean = whole[name].output_sum
        assert mean is not None and whole[name].channel_sum is not None and mean.any()
    said = run_json("info", tmp_path / "whole")
    assert said["outputs"] is True


def test_coalitions_logits_and_a_trace(work: Path, tmp_path: Path) -> None:
    """The same bits in one run, layer by layer and in shards, and nothing else changes."""
    asked = ("--coalitions", 200, "--logits")
    runs = (("whole", ("--trace", tmp_path / "one")), ("layers", ("--stream",)))
    for name, more in (*runs, ("a", ("--shard", "0/2")), ("b", ("--shard", "1/2"))):
        code, _, err = layer_by_layer(work, tmp_path / name, *asked, *more)
        assert code == 0 and ", coalitions, logits, " in err, err
    code, _, err = invoke("combine", tmp_path / "b", tmp_path / "a", "--out", tmp_path / "combined")
    assert code == 0, err
    whole, layers, combined = (
        Statistics.load(tmp_path / name) for name in ("whole", "layers", "combined")
    )
    assert whole.digest() == layers.digest() == combined.digest()
    for name in whole.layers:
        bare = Statistics.load(work / "one.st")[name].tensors()
        tensors, layer = whole[name].tensors(), whole[name]
        assert all(torch.equal(tensors[field], bare[field]) for field in bare)
        assert layer.chosen is not None and layer.chosen.tokens == layer.tokens == 512
        assert len(layer.chosen.sets) <= 200 and layer.logit_sum is not None
    said = run_json("info", tmp_path / "whole")
    assert (said["coalitions"], said["logits"]) == (200, True)
    said = run_json("info", tmp_path / "one")
    assert (said["kind"], said["tokens"], said["gates"]) == ("trace", 512, "applied")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--trace", "{}/t", "--shard", "0/2"), "a run in one process, and this process has a sh"),
        (("--trace-tokens", 5), "--trace-tokens is of --trace: give that too"),
        (("--trace", "{}/x.st"), "--trace and --out are both"),
        (("--trace", "{}/no/t"), "does not exist: create the folder first"),
        (("--trace", MODEL / "config.json"), "which is read: choose another place"),
        (("--coalitions", 1 << 30), "how many sets of experts to keep per layer"),
    ],
)
def test_a_trace_refused(work: Path, tmp_path: Path, more: tuple[object, ...], said: str) -> None:
    given = (str(each).format(tmp_path) for each in more)
    code, _, err = layer_by_layer(work, tmp_path / "x.st", *given)
    assert code == 2 and said in err.splitlines()[-1], err
    assert not list(tmp_path.iterdir())


def test_layer_by_layer_by_itself(work: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Where the model would not fit, which is said."""
    from reap.runs import memory, mode

    need = memory.resident() + (2 << 30)
    monkeypatch.setattr(mode, "LOADING", 1e6)
    code, _, err = layer_by_layer(work, tmp_path / "x.st", "--memory-limit", f"{need}", "--json")
    assert code == 0 and "calibrating: layer by layer (whole it takes 7" in err
    found = Statistics.load(tmp_path / "x.st")
    assert found.digest() == Statistics.load(work / "one.st").digest()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--memory-limit", "100M"), "memory do not hold one layer"),
        (("--memory-limit", "much"), "'much' is not a size: write it like 24G"),
        (("--no-stream", "--wave-tokens", 100), "are not for --no-stream"),
        (("--no-stream", "--memory-limit", "1G"), "are not for --no-stream"),
    ],
)
def test_layer_by_layer_refused(
    work: Path, tmp_path: Path, more: tuple[object, ...], said: str
) -> None:
    code, _, err = layer_by_layer(work, tmp_path / "x.st", *more)
    assert code == 2 and said in err.splitlines()[-1], err
    assert not list(tmp_path.glob("*.st*"))


def test_layer_by_layer_survives_a_kill(work: Path, tmp_path: Path) -> None:
    """Not to be caught: what was whole is in the file, and the same command goes on from it."""
    options = ("--max-tokens", 3000, "--seq-len", 64, "--wave-tokens", 256)
    command = [str(word) for word in (*CALIBRATE, tmp_path / "x.st", *options)]
    kept = tmp_path / f"x.st{PARTIAL}"
    with open(os.devnull, "w") as nowhere:
        process = program(command[1:], nowhere.fileno(), nowhere.fileno())
    while not kept.exists() and os.waitpid(process, os.WNOHANG) == (0, 0):
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    assert Statistics.load(kept).tokens % 256 == 0
    code, out, err = invoke(*command[3:])
    assert code == 0 and "x.st: 3,000 tokens" in out and not kept.exists(), err
    whole = [*CALIBRATE[3:], tmp_path / "y.st", *options[:-2]]
    assert invoke(*whole)[0] == 0
    digests = {Statistics.load(tmp_path / name).digest() for name in ("x.st", "y.st")}
    assert len(digests) == 1
