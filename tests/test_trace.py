"""A trace: what each token chose, as a file that numpy reads."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from brute import brute_force, run
from test_waves import here, streamed, text  # noqa: F401
from tiny import tiny_inputs, tiny_model

from reap.errors import ReapError
from reap.model.load import load_model
from reap.observation.patch import observe
from reap.runs.calibration import calibrate
from reap.runs.partial import Partial
from reap.statistics.trace import Trace, read_about, trace_size


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """With numpy alone."""
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    about = json.loads(header.pop("__metadata__")["reap"])
    kinds = {"I32": "<i4", "F32": "<f4"}
    return {
        name: np.ndarray(f["shape"], kinds[f["dtype"]], data, begin + f["data_offsets"][0])
        for name, f in header.items()
    }, about


@pytest.mark.parametrize("model_type", ("qwen3_moe", "zaya"))
def test_against_brute_force(tmp_path: Path, model_type: str) -> None:
    model = tiny_model(model_type)
    inputs = tiny_inputs(model, lengths=[6, 3])
    keep = inputs["attention_mask"].flatten().bool()
    trace = Trace(tmp_path / "trace", 1000)
    with observe(model, trace=trace) as stats, brute_force(model) as truth:
        run(model, inputs)
        with stats.counting(torch.zeros(2, 6)):
            run(model, inputs)
        with stats.counting(inputs["input_ids"] % 2 == 0):
            run(model, inputs)
    tensors, about = read(tmp_path / "trace")
    assert about["gates"] == "applied" and about["model"] == stats.model.to_json()
    odd = (inputs["input_ids"] % 2 == 0).flatten() & keep
    places = [(0, int(t)) for t in keep.nonzero()] + [(2, int(t)) for t in odd.nonzero()]
    for name in stats.layers:
        ids, gates, norms = (tensors[f"{name}/{field}"] for field in ("ids", "gates", "norms"))
        where = [(call, *divmod(token, 6)) for call, token in places]
        assert tensors[f"{name}/places"].tolist() == [list(each) for each in where]
        slots: dict[int, list] = {}
        for token, expert, gate, norm, _ in truth[name].slots:
            slots.setdefault(token, []).append((expert, gate, norm))
        for row, (call, token) in enumerate(places):
            expected = sorted(slots.get(12 * call + token, ()))
            found = [x for x in zip(ids[row], gates[row], norms[row], strict=True) if x[0] >= 0]
            assert [x[0] for x in sorted(found)] == [x[0] for x in expected]
            np.testing.assert_allclose(sorted(found), expected, rtol=1e-4)
        assert len(ids) == len(places) == stats[name].tokens


@pytest.mark.parametrize("tokens", (1, 7, 12))
def test_bounded(tmp_path: Path, tokens: int) -> None:
    model = tiny_model("qwen3_moe")
    for path, most in (("all", 100), ("some", tokens)):
        with observe(model, trace=Trace(tmp_path / path, most)) as stats:
            run(model, tiny_inputs(model))
            run(model, tiny_inputs(model, lengths=[3, 2]))
    every, some = read(tmp_path / "all")[0], read(tmp_path / "some")[0]
    assert len(every) == len(some) == 4 * len(stats.layers)
    for name, rows in every.items():
        assert len(rows) == 23 and np.array_equal(some[name], rows[:tokens])
    header = int.from_bytes((tmp_path / "some").read_bytes()[:8], "little") + 8
    assert (tmp_path / "some").stat().st_size == header + trace_size(stats.model, tokens)
    assert read_about(tmp_path / "some") == (stats.model, "applied", tokens)


def test_layer_by_layer_it_is_the_same(here: Path) -> None:  # noqa: F811
    calibrate(load_model(here / "model", device="cpu"), text(here), trace=Trace(here / "one", 99))
    streamed(here, trace=Trace(here / "two", 99))
    assert (here / "one").read_bytes() == (here / "two").read_bytes()
    assert len(read(here / "one")[0].popitem()[1]) == 99


def test_a_run_that_goes_on_has_none(here: Path) -> None:  # noqa: F811
    model = load_model(here / "model", device="cpu")
    rows, partial = text(here), Partial(here / "kept")
    first = next(rows)
    with observe(model) as stats:
        model(first.input_ids)
    partial.keep(stats, ["default"], rows, {})
    partial._lock.release()
    with pytest.raises(ReapError, match="the trace .*one would lack that"):
        calibrate(model, text(here), partial=Partial(here / "kept"), trace=Trace(here / "one"))
    assert not (here / "one").exists()


def test_whole_or_not_at_all(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(RuntimeError, match="mine"), observe(model, trace=Trace(tmp_path / "trace")):
        run(model, tiny_inputs(model))
        raise RuntimeError("mine")
    assert list(tmp_path.iterdir()) == []
    trace = Trace(tmp_path / "trace", 5)
    with observe(model, trace=trace):
        run(model, tiny_inputs(model))
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]
    with pytest.raises(ReapError, match="a trace is of one observe"), observe(model, trace=trace):
        pass
    before = (tmp_path / "trace").read_bytes()
    with pytest.raises(ReapError, match="trace exists"):
        Trace(tmp_path / "trace")
    with observe(model, trace=Trace(tmp_path / "trace", 4, overwrite=True)):
        run(model, tiny_inputs(model))
    assert (tmp_path / "trace").read_bytes() != before


def test_bad_input(tmp_path: Path) -> None:
    for tokens in (0, 1.5, True):
        with pytest.raises(ReapError, match="a whole number of 1 or more"):
            Trace(tmp_path / "trace", tokens)  # type: ignore[arg-type]
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ReapError, match="it is not a trace of ours"):
        Trace(tmp_path / "mine", overwrite=True)
    with pytest.raises(ReapError, match="does not exist"):
        Trace(tmp_path / "no" / "trace")
    with pytest.raises(ReapError):
        read_about(tmp_path / "mine")
