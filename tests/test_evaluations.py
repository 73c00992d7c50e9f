"""An evaluation in the card and the record of a pruned folder, which still verifies."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from commandline import invoke, run_json
from folders import saved, some_plan
from merges import some_merge

from reap.checkpoint import evaluations
from reap.checkpoint.evaluations import BEGIN, check_recordable, record_evaluation, said
from reap.checkpoint.pruning import prune
from reap.checkpoint.verification import verify
from reap.errors import ReapError
from reap.merging.rewriting import merge
from reap.model.identity import describe_folder
from reap.report.measured import read_costs
from reap.runs.generation import Generation

TEXTS = Generation(texts=20, tokens=600, looped=0, ended=15, at_limit=5, distinct=0.5).to_json()
LOOSE = Generation(texts=20, tokens=0, looped=1, ended=20, at_limit=0, distinct=math.nan).to_json()
RESULTS: dict[str, Any] = {
    "code|x": {
        "tokens": 1234,
        "loss": 3.5,
        "perplexity": math.inf,
        "kl": 0.25,
        "agreement": 0.5,
        "teacher_loss": 3.0,
    },
    "total": {
        "tokens": 1234,
        "loss": 3.5,
        "perplexity": 33.1,
        "kl": 0.25,
        "agreement": 0.5,
        "teacher_loss": 3.0,
        "generation": LOOSE,
        "teacher_generation": TEXTS,
        "tasks": {"quiz": {"samples": 6, "acc,none": 0.5, "acc_stderr,none": 0.2236}},
        "teacher_tasks": {"quiz": {"samples": 6, "acc,none": 1.0, "acc_stderr,none": None}},
    },
}
EVALUATION = {
    "results": RESULTS,
    "against": "org/base",
    "text": {"sources": [{"spec": "held.jsonl", "domain": "code", "tokens": 1235}]},
    "generation": {"prompt_tokens": 32, "new_tokens": 64, "temperature": None, "seed": 0},
    "tasks": {"tasks": ["quiz"], "shots": None, "limit": 6, "lm_eval": "0.4.13"},
    "command": "reap evaluate out",
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("job")
    saved(root / "base", num_hidden_layers=2)
    prune(root / "base", some_plan(root / "base"), root / "out")
    return root


@pytest.fixture
def out(job: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(job / "out", tmp_path / "out"))


def test_card_and_record(out: Path) -> None:
    before = (out / "README.md").read_text()
    old = json.loads((out / "reap.json").read_text())
    record_evaluation(out, EVALUATION)
    card = (out / "README.md").read_text()
    for line in (
        "On `held.jsonl`, in nats per token",
        "(the original is `org/base`):",
        "| `code\\|x` | 1,234 | 3.5000 |  | 3.0000 | 0.2500 | 50.0% |",
        "Text, the likeliest, of at most 64 tokens behind the first",
        "| original | `total` | 20 | 0.0% (0.0% to 16.1%) | 75.0% (53.1% to 88.8%) "
        "| 25.0% (11.2% to 46.9%) | 50.0% |",
        "| this model | `total` | 20 | 5.0% (0.9% to 23.6%) | 100.0% (83.9% to 100.0%) "
        "| 0.0% (0.0% to 16.1%) |  |",
        "| `quiz` | `acc,none` | 6 | 1.0000 | 0.5000 ± 0.2236 |",
        "Measured by `reap evaluate out`.",
    ):
        assert line in card.splitlines(), line
    assert card.index("## Evaluation") < card.index("## Use")
    start, end = card.index(BEGIN), card.index(evaluations.END) + len(evaluations.END) + 1
    assert card[:start] + card[end:] == before, "the rest is as it was"
    record = json.loads((out / "reap.json").read_text())
    told, files = record.pop("evaluation"), record.pop("files")
    assert told["results"]["code|x"]["perplexity"] is None and "reap" in told["versions"]
    assert told["results"]["total"]["generation"] == RESULTS["total"]["generation"]
    assert record == {k: v for k, v in old.items() if k != "files"}
    assert files.keys() == old["files"].keys() and files != old["files"]
    assert verify(out).compared == "the checksums in reap.json"
    (out / "README.md").write_text(card.replace("0.2500", "0.2400"))
    with pytest.raises(ReapError, match="README.md is not what was written"):
        verify(out)


def test_a_later_one_takes_its_place(out: Path) -> None:
    record_evaluation(out, EVALUATION)
    first = (out / "README.md").read_text()
    alone = {"d": {"tokens": 7, "loss": 1.0, "perplexity": 2.7}}
    record_evaluation(out, {"results": alone, "against": None})
    card = (out / "README.md").read_text()
    assert card.count("## Evaluation") == 1 and "not compared with the original" in card
    assert "| `d` | 7 | 1.0000 | 2.7000 |" in card and "quiz" not in card
    record_evaluation(out, EVALUATION)
    assert (out / "README.md").read_text() == first
    verify(out)


def test_it_is_told_of_a_folder(out: Path) -> None:
    assert "evaluation" not in run_json("info", out)
    record_evaluation(out, EVALUATION)
    assert run_json("info", out)["evaluation"]["against"] == "org/base"
    (line,) = [line for line in invoke("info", out)[1].splitlines() if "evaluation" in line[:10]]
    assert line.split(None, 1)[1] == (
        "code|x loss 3.5000, the original's 3.0000, KL 0.2500; "
        "total loss 3.5000, the original's 3.0000, KL 0.2500; "
        "total 20 texts, loop 5.0% (0.9% to 23.6%); quiz acc,none 0.5000 ± 0.2236"
    )
    assert said({"results": {"d": {"loss": 1.0}}}) == "d loss 1.0000"
    for damaged in (None, 3, {}, {"results": [1]}, {"results": {"a": {"loss": "x"}}}):
        assert said(damaged) == "damaged"


def test_a_report_reads_it(out: Path) -> None:
    with pytest.raises(ReapError, match="records no evaluation: `reap evaluate --card` writes one"):
        read_costs(out)
    record_evaluation(out, EVALUATION)
    for given in (out, out / "reap.json"):
        code, total = read_costs(given)
        assert (code.plan, code.domain, code.increase) == (out.name, "code|x", 0.5)
        assert total.kl == 0.25


def test_a_merged_folder(job: Path, tmp_path: Path) -> None:
    merge(job / "base", some_merge(describe_folder(job / "base")), tmp_path / "out", verify=False)
    record_evaluation(tmp_path / "out", EVALUATION)
    assert "± 0.2236" in (tmp_path / "out" / "README.md").read_text()
    assert "vllm serve out" in (tmp_path / "out" / "README.md").read_text()
    assert verify(tmp_path / "out").compared == "the sizes in reap.json"


@pytest.mark.parametrize("last", range(4))
def test_whenever_it_stops_the_folder_verifies(
    out: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    written: list[Path] = []
    write = evaluations.write_file

    def stop(path: Path, *given: Any, **more: Any) -> None:
        if len(written) == last:
            raise KeyboardInterrupt
        write(path, *given, **more)
        written.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(evaluations, "write_file", stop)
        if last < 3:
            with pytest.raises(KeyboardInterrupt):
                record_evaluation(out, EVALUATION)
        else:
            record_evaluation(out, EVALUATION)
    assert len(written) == last
    verify(out)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    record_evaluation(out, EVALUATION)
    files = json.loads((out / "reap.json").read_text())["files"]
    assert "crc32" in files["README.md"], "which the next run gives back"
    verify(out)


def test_folders_that_are_not_ours(job: Path, out: Path, tmp_path: Path) -> None:
    check_recordable(out)
    with pytest.raises(ReapError, match="base has no reap.json: only what reap pruned or merged"):
        check_recordable(job / "base")
    (out / "README.md").unlink()
    with pytest.raises(ReapError, match="cannot read .*README.md, the card"):
        record_evaluation(out, EVALUATION)
    (out / "reap.json").write_text('{"format": "other"}')
    with pytest.raises(ReapError, match="no record of a pruned model"):
        record_evaluation(out, EVALUATION)
