"""Every experiment runs, RESULTS.md is what the raw results say, and the measures are right."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import noise, running, transfer
from experiments.__main__ import HERE, main
from experiments.generation import greedy, read, right_answers, until_end
from experiments.measures import (
    Interval,
    distinct,
    jensen_shannon,
    kendall,
    loops,
    over_seeds,
    overlap,
    spread,
    wilson,
)
from experiments.reading import AGAINST, AGREES, OPEN, verdict
from experiments.results import EXPERIMENTS, TITLES, page
from experiments.results import read as read_results
from experiments.setting import FULL, QUICK
from experiments.store import Store, encoded, load, rounded
from experiments.subject import Subject
from experiments.texts import DOMAINS, is_test, texts
from reap.errors import ReapError

RESULTS = HERE / "results"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All experiments at their quick size, figures and page included."""
    out = tmp_path_factory.mktemp("experiments")
    assert main(["--quick", "--jobs", "1", "--out", str(out)]) == 0
    return out


def test_every_experiment_runs_and_is_drawn(measured: Path) -> None:
    for name, module in EXPERIMENTS.items():
        cells = load(measured / "results" / f"{name}.json")["cells"]
        assert sorted(cells) == [f"softmax/{key}" for key in module.keys(QUICK)]
        assert (measured / "figures" / f"{name}.svg").read_text().count("<path") > 5
    text = (measured / "RESULTS.md").read_text()
    assert all(f"## {title}" in text for title in TITLES.values())
    assert "nan" not in text and "None" not in text


def test_a_run_goes_on_where_it_was(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = measured / "results" / "noise.json"
    whole = path.read_bytes()
    data = json.loads(whole)
    del data["cells"]["softmax/1"]
    path.write_bytes(encoded(data["setting"], data["cells"]))
    asked: list[str] = []
    real = EXPERIMENTS["noise"].cell

    def recorded(subject: Subject, key: str) -> Any:
        asked.append(key)
        return real(subject, key)

    monkeypatch.setattr(EXPERIMENTS["noise"], "cell", recorded)
    again = ["noise", "--quick", "--jobs", "1", "--out", str(measured)]
    assert main(again) == 0
    assert asked == ["1"] and path.read_bytes() == whole


def test_worker_processes_find_what_they_run() -> None:
    """By name: what `python -m` runs has none."""
    assert pickle.loads(pickle.dumps(running.measured)) is running.measured
    assert running.measured.__module__ == "experiments.running"


def test_results_of_another_setting_are_refused(measured: Path) -> None:
    with pytest.raises(ReapError, match="--fresh"):
        Store(measured / "results", "noise", replace(QUICK, new_tokens=9))


def test_the_page_is_what_the_raw_results_say() -> None:
    results = read_results(RESULTS)
    assert list(results) == list(EXPERIMENTS)
    assert (HERE / "RESULTS.md").read_text() == page(results)


def test_the_raw_results_are_whole_and_of_these_models() -> None:
    for name, module in EXPERIMENTS.items():
        data = load(RESULTS / f"{name}.json")
        assert data["setting"] == FULL.to_json(), f"make experiments: {name} is of something else"
        expected = {f"{model}/{key}" for model in FULL.models for key in module.keys(FULL)}
        assert set(data["cells"]) == expected


def test_names_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["sweeep"], ["--quick"]):
        with pytest.raises(SystemExit) as stop:
            main(given)
        assert stop.value.code == 2
    assert "sweeep" in capsys.readouterr().err


def test_nothing_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--draw", "--out", str(tmp_path)]) == 2
    assert "no results" in capsys.readouterr().err


# Measures, against values from their sources or by hand.


def test_wilson() -> None:
    """Of Newcombe (Statistics in Medicine 17, 1998), table I, method 3."""
    for successes, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        share = wilson(successes, trials)
        assert share.middle == successes / trials
        assert share.low == pytest.approx(low, abs=5e-5)
        assert share.high == pytest.approx(high, abs=5e-5)
    assert wilson(20, 20).high == 1.0


def test_over_seeds() -> None:
    value = over_seeds([1.0, 2.0, 3.0, 4.0])  # t(0.975, 3) = 3.182446, s = 1.290994
    assert value.middle == 2.5
    assert value.high - value.middle == pytest.approx(3.182446 * 1.290994 / 2, rel=1e-6)
    assert not over_seeds([-1.0, 1.0]).excludes_zero
    assert over_seeds([1.0, 1.1, 0.9]).excludes_zero
    assert math.isnan(over_seeds([1.0]).low) and not over_seeds([1.0]).excludes_zero


def test_verdict() -> None:
    assert verdict(Interval(-1.0, -2.0, -0.5)) == AGREES
    assert verdict(Interval(1.0, 0.5, 2.0)) == AGAINST
    assert verdict(Interval(-1.0, -2.0, 0.5)) == OPEN
    assert verdict(over_seeds([-1.0])) == OPEN


def test_distinct() -> None:
    assert distinct([[1, 2, 1, 2]], 2) == 2 / 3
    assert distinct([[1, 2, 3], [1, 2, 4]], 2) == 3 / 4  # not across texts, and over all of them
    assert distinct([[5] * 10], 3) == 1 / 8
    assert math.isnan(distinct([[1]], 2))


def test_jensen_shannon() -> None:
    apart = torch.tensor([[50.0, -50.0], [0.0, 0.0]])
    other = torch.tensor([[-50.0, 50.0], [0.0, 0.0]])
    assert jensen_shannon(apart, other).tolist() == pytest.approx([math.log(2), 0.0], abs=1e-6)
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])  # m = (0.7, 0.3)
    by_hand = 0.5 * (0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3))
    by_hand += 0.5 * (0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3))
    assert float(jensen_shannon(p.log(), q.log())) == pytest.approx(by_hand, rel=1e-5)
    assert float(jensen_shannon(q.log(), p.log())) == pytest.approx(by_hand, rel=1e-5)


def test_loops() -> None:
    text = list(range(100, 140))
    assert not loops(text) and not loops([])
    assert loops([*text, *[7] * 24]) and not loops([*text, *[7] * 23])
    assert loops([*text, *[1, 2, 3] * 8]) and not loops([*text, *[1, 2, 3] * 7])
    cycle = list(range(30))
    assert loops(cycle * 4) and not loops(cycle * 3)
    assert not loops([*cycle * 4, 99])  # it has got out
    assert not loops(list(range(33)) * 4)  # longer than a period may be


def test_kendall_overlap_spread() -> None:
    assert kendall([1, 2, 3], [10, 20, 30]) == 1 and kendall([1, 2, 3], [3, 2, 1]) == -1
    assert kendall([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    assert overlap({1, 2, 3}, {2, 3, 4}) == 0.5 and overlap(set(), set()) == 1
    assert spread(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 3.0], [0.0, -3.0]])) == 5.0
    points, weights = torch.tensor([[0.0, 0.0], [4.0, 0.0]]), torch.tensor([3, 1])
    assert spread(points, weights) == spread(points[[0, 0, 0, 1]]) == 3.0


def test_rounded() -> None:
    assert rounded({"a": [1.23456789, (2, "x", True)]}) == {"a": [1.23457, [2, "x", True]]}


# Text and generation.


def test_texts_are_labelled() -> None:
    assert is_test("test/test_ast.py") and is_test("idlelib/idle_test/test_text.py")
    assert not is_test("unittest/case.py") and not is_test("test.py")
    for domain in DOMAINS:
        first = [next(texts(domain, held_out=False, seed=seed)) for seed in (0, 0, 1)]
        assert first[0] == first[1] != first[2]


def test_samples() -> None:
    """A seed is another sample; held-out text is the same for all, in parts or not."""
    subject = Subject("softmax", replace(QUICK, evaluation_tokens=128))
    first, again, other = (subject.text("prose", seed)[0].input_ids for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    whole = subject.held_out()
    parts = subject.held_out(parts=4)
    assert [b.domain for b in whole] == list(DOMAINS)
    joined = torch.cat([b.input_ids for b in parts if b.domain.startswith("tests/")])
    assert torch.equal(joined, whole[DOMAINS.index("tests")].input_ids)


class Counter(torch.nn.Module):
    """Says the next number, and an end (0) behind 5."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        following = torch.where(input_ids == 5, 0, input_ids + 1)
        logits = torch.nn.functional.one_hot(following, 16).float() * 10
        return type("Output", (), {"logits": logits})


def test_answers() -> None:
    rows = torch.tensor([[1, 2, 3, 4], [2, 3, 4, 5], [7, 8, 9, 10], [8, 9, 11, 3]])
    assert right_answers(Counter(), rows, 2, 4) == 3


def test_greedy_text_ends() -> None:
    model = Subject("softmax", QUICK).model
    texts = greedy(model, torch.tensor([[5, 6, 7], [8, 9, 10]]), 6)
    assert texts.shape == (2, 6)
    assert until_end(torch.tensor([4, 5, 0, 1, 1]), 0) == [4, 5]
    said = read(torch.tensor([[4, 5, 0, 1], [4, 5, 6, 7]]), 0)
    assert (said["texts"], said["ended"], said["loops"]) == (2, 1, 0)
    assert said["distinct"] == {"2": 3 / 4, "3": 1.0, "4": 1.0}


def test_summaries_by_hand() -> None:
    one = {"reap@0.25": {"dropped": [[0, 1]], "increase": {"a/0": 1.0, "a/1": 3.0, "total": 2.0}}}
    two = {"reap@0.25": {"dropped": [[1, 2]], "increase": {"a/0": 2.0, "a/1": 2.0, "total": 2.0}}}
    both = [one | {"ean@0.25": two["reap@0.25"]}, two | {"ean@0.25": two["reap@0.25"]}]
    assert noise.agreement(both, "reap@0.25") == pytest.approx(1 / 3)
    assert noise.by_part(both, "reap@0.25", "ean@0.25") == [-0.5, 0.5]
    cell = {f"reap/{d}": dict.fromkeys(DOMAINS, 9.0) | {d: 1.0} for d in DOMAINS}
    cell |= {f"reap/all but {d}": dict.fromkeys(DOMAINS, 0.0) | {d: 2.0} for d in DOMAINS}
    assert transfer.average([cell], "reap", "matched") == [1.0]
    assert transfer.average([cell], "reap", "mismatched") == [2.0]
