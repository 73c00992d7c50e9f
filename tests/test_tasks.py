"""Tasks of lm-evaluation-harness: one of our own, without a network, where that is installed."""

from __future__ import annotations

import json
import math
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import MODEL, invoke, refused, run_json
from folders import some_plan

from reap.errors import ReapError
from reap.model.identity import describe_folder
from reap.model.load import load_model, load_tokenizer
from reap.runs import tasks
from reap.runs.masking import masked
from reap.runs.tasks import Tasks

QUESTIONS: list[dict[str, Any]] = [
    {
        "question": f"def f{i}(self):",
        "choices": ["\n    return", " pass", " zebra"],
        "answer": i % 3,
    }
    for i in range(9)
]
YAML = """
task: our_quiz
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
harness = pytest.mark.skipif(
    not all(map(find_spec, tasks.NEEDED)), reason=f"needs lm-evaluation-harness: {tasks.INSTALL}"
)


@pytest.fixture
def quiz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (folder / "quiz.yaml").write_text(YAML.replace("ROWS", str(rows)))
    (folder / "lost.yaml").write_text(YAML.replace("ROWS", "gone").replace("our_quiz", "lost"))
    return folder


def by_hand(model: Any, tokenizer: Any, limit: int) -> float:
    """The share of questions whose answer is the likeliest choice."""
    right = 0
    for row in QUESTIONS[:limit]:
        start = tokenizer(row["question"]).input_ids
        scores = []
        for choice in row["choices"]:
            whole = tokenizer(f"{row['question']}{choice}").input_ids
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([whole])).logits[0].float().log_softmax(-1)
            scores.append(
                sum(float(logits[i - 1, whole[i]]) for i in range(len(start), len(whole)))
            )
        right += scores.index(max(scores)) == row["answer"]
    return right / limit


def test_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded, and with what to do."""
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    line = refused("evaluate", MODEL, "--tasks", "arc_easy")
    assert "tasks need lm_eval" in line and "pip install 'lm-eval[hf]'" in line
    monkeypatch.setattr(tasks, "find_spec", lambda name: name == "lm_eval" or None)
    with pytest.raises(ReapError, match="tasks need accelerate, which is not installed: pip"):
        Tasks(["arc_easy"])


@harness
@pytest.mark.slow
def test_a_task_of_the_model_and_of_a_mask(quiz: Path) -> None:
    model, tokenizer = load_model(MODEL), load_tokenizer(MODEL)
    ours = Tasks(["our_quiz"], path=quiz, limit=8)
    plain = ours.run(model, tokenizer, batch_size=2)
    assert plain["our_quiz"]["samples"] == 8
    assert plain["our_quiz"]["acc,none"] == by_hand(model, tokenizer, 8)
    assert all(v is None or math.isfinite(v) for v in plain["our_quiz"].values())
    assert ours.describe()["tasks"] == ["our_quiz"] and ours.describe()["limit"] == 8
    with masked(model, some_plan(MODEL, 2, model=describe_folder(MODEL))):
        cut = ours.run(model, tokenizer)
        assert cut["our_quiz"]["acc,none"] == by_hand(model, tokenizer, 8)
    assert ours.run(model, tokenizer) == plain


@harness
@pytest.mark.slow
def test_the_command_and_the_card(quiz: Path, work: Path, tmp_path: Path) -> None:
    pruned = shutil.copytree(work / "pruned", tmp_path / "pruned")
    asked = ("--tasks", "our_quiz", "--task-path", quiz, "--task-limit", 6)
    plan = work / "plan.json"
    found = run_json("evaluate", pruned, *asked, "--teacher", MODEL, "--card")
    assert found.keys() == {"total"} and found["total"].keys() == {"tasks", "teacher_tasks"}
    by_plan = run_json("evaluate", MODEL, *asked, "--plan", plan)[str(plan)]
    for key in ("tasks", "teacher_tasks"):
        assert by_plan["total"][key] == found["total"][key]
    card = (pruned / "README.md").read_text()
    assert "at most 6 questions of each" in card and "| `our_quiz` | `acc,none` | 6 |" in card
    assert run_json("verify", pruned)["compared"] == "the checksums in reap.json"
    table = invoke("evaluate", pruned, *asked)[1]
    assert "our_quiz" in table and "original" not in table


@harness
@pytest.mark.slow
def test_tasks_that_cannot_be_asked(quiz: Path) -> None:
    assert "has no task 'no_such'" in refused("evaluate", MODEL, "--tasks", "no_such")
    with pytest.raises(ReapError, match="cannot load lost: .*gone"):
        Tasks(["lost"], path=quiz)
    with pytest.raises(ReapError, match="gone is no folder"):
        Tasks(["our_quiz"], path="gone")
    with pytest.raises(ReapError, match="names none"):
        Tasks([])
