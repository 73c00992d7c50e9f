"""What users of the API give: it works, or is refused in one line of the API's own words."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_inputs, tiny_model

import reap
from reap.app.console import as_flags
from reap.text.batching import Batch


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen3_moe")


@pytest.fixture(scope="module")
def stats(model: Any) -> reap.Statistics:
    return reap.calibrate(model, [tiny_inputs(model, lengths=[9, 5])])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, model: Any, stats: reap.Statistics) -> Path:
    folder = tmp_path_factory.mktemp("api")
    model.save_pretrained(folder / "model")
    stats.save(folder / "s.st")
    reap.make_plan(stats, ratio=0.5).save(folder / "p.json")
    return folder


def test_what_a_data_loader_yields(model: Any, stats: reap.Statistics) -> None:
    inputs = tiny_inputs(model, lengths=[9, 5])
    assert stats.tokens == 14 and stats.domains == ("default",)
    assert reap.calibrate(model, [Batch(**inputs, domain="default")]) == stats
    whole = {"input_ids": inputs["input_ids"], "domain": "code"}
    assert reap.calibrate(model, [whole]).domain_tokens == {"code": 18}
    assert reap.evaluate(model, [inputs])["total"].tokens == 8 + 4


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (None, "a batch is a NoneType"),
        ({"ids": torch.zeros(1, 2)}, "a batch is a dict: it must be"),
        ({"input_ids": torch.zeros(1, 2)}, "input_ids of a batch are torch.float32"),
        ({"input_ids": torch.zeros(2, dtype=torch.int64)}, "input_ids .rows, length."),
        (
            {"input_ids": torch.ones(1, 3).int(), "attention_mask": torch.ones(3)},
            r"shape .* \[1, 3\]",
        ),
    ],
)
def test_what_is_no_batch(model: Any, batch: Any, message: str) -> None:
    for run in (reap.calibrate, reap.evaluate):
        with pytest.raises(reap.ReapError, match=message):
            run(model, [batch])


def test_files_stand_for_what_is_in_them(files: Path, stats: reap.Statistics) -> None:
    for path in (files / "s.st", str(files / "s.st")):
        plan = reap.make_plan(path, ratio=0.5)
        assert plan == reap.Plan.load(files / "p.json")
        scores = reap.saliency(path)
        assert all(
            torch.equal(scores[name], values) for name, values in reap.saliency(stats).items()
        )
    report = reap.prune(files / "model", files / "p.json", files / "pruned")
    assert set(report.kept.values()) == {4}


def test_objects_where_files_belong(model: Any, files: Path, stats: reap.Statistics) -> None:
    plan = reap.make_plan(stats, ratio=0.5)
    for refused, message in {
        lambda: reap.prune(model, plan, files / "x"): "model_dir is a Qwen3MoeForCausalLM",
        lambda: reap.prune(files / "model", plan, None): "out_dir is a NoneType",  # type: ignore[arg-type]
        lambda: reap.evaluate("a folder", []): "model is a str: it must be a model",
        lambda: reap.evaluate(model, [], teacher="a folder"): "teacher is a str",
        lambda: reap.make_plan(reap.saliency(stats), ratio=0.5): "stats is a dict",  # type: ignore[arg-type]
        lambda: reap.saliency(files / "none.st"): "none.st",
    }.items():
        with pytest.raises(reap.ReapError, match=message):
            refused()
    assert not (files / "x").exists()


def test_what_is_no_path(tmp_path: Path, model: Any, stats: reap.Statistics) -> None:
    plan = reap.make_plan(stats, ratio=0.5)
    refusals: dict[Any, str] = {
        lambda: reap.prune(tmp_path, stats, tmp_path / "x"): "the plan is a Statistics: it must be",  # type: ignore[arg-type]
        lambda: reap.Plan.load(3): "the plan is a int",  # type: ignore[arg-type]
        lambda: reap.Statistics.load(None): "path is a NoneType: it must be a file of statistics",  # type: ignore[arg-type]
        lambda: stats.save(None): "path is a NoneType",  # type: ignore[arg-type]
        lambda: plan.save(b"p.json"): "path is a bytes",  # type: ignore[arg-type]
        lambda: reap.verify(plan): "folder is a Plan",  # type: ignore[arg-type]
        lambda: reap.batches("stdlib:code", "a folder"): "tokenizer is a str: it must be the",
        lambda: reap.calibrate(model, None): "batches is a NoneType",  # type: ignore[arg-type]
        lambda: reap.evaluate(model, 3): "batches is a int",  # type: ignore[call-overload]
    }
    for refused, message in refusals.items():
        with pytest.raises(reap.ReapError, match=message):
            refused()


def test_what_is_printed_of_results(model: Any, stats: reap.Statistics) -> None:
    name = stats.layers[0]
    plan = reap.make_plan(stats, ratio=0.5)
    assert repr(stats) == (
        f"<Statistics of {stats.model.name}: 14 tokens through 4 MoE layers, domains default>"
    )
    assert repr(stats[name]) == f"<LayerStatistics of {name}: 8 experts, 14 tokens>"
    assert repr(plan) == f"<Plan of {stats.model.name} by reap: keeps 4 of 8 experts in 4 layers>"
    assert "structure" not in repr(stats.model)


def test_a_path_is_a_spec(files: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        Path(__file__).parent.parent / "models/tiny-qwen3-moe"
    )
    text = files / "a.txt"
    text.write_text("def f(x): return x + 1")
    counts = [
        sum(batch.tokens for batch in reap.batches(s, tokenizer)) for s in (text, [text], str(text))
    ]
    assert counts[0] > 0 and len(set(counts)) == 1


def test_plans_are_copied_and_pickled(stats: reap.Statistics) -> None:
    plan = reap.make_plan(stats, ratio=0.5)
    for other in (copy.deepcopy(plan), copy.copy(plan), pickle.loads(pickle.dumps(plan))):
        assert other == plan and other.dropped == plan.dropped


def test_statistics_are_summed_and_iterated(stats: reap.Statistics) -> None:
    total = sum([stats, stats])
    assert isinstance(total, reap.Statistics) and total == stats + stats
    assert list(stats) == list(stats.layers) and len(stats) == len(stats.layers)
    assert stats.layers[0] in stats and "nothing" not in stats
    with pytest.raises(TypeError):
        1 + stats
    with pytest.raises(TypeError):
        stats + None


def test_the_library_speaks_of_arguments_and_the_command_of_options(files: Path) -> None:
    with pytest.raises(
        reap.ReapError, match="exists: choose another name or pass overwrite=True"
    ) as e:
        reap.Plan.load(files / "p.json").save(files / "p.json")
    assert as_flags(str(e.value)).endswith("or pass --overwrite")
    assert as_flags("try multiple_of=8, a=b, keep=12") == "try --multiple-of 8, a=b, --keep 12"
    assert as_flags('is global: pass scope="global" too') == "is global: pass --scope global too"
    assert (
        as_flags("a smaller batch_size or seq_len, or") == "a smaller --batch-size or --seq-len, or"
    )
    names = "a=1", "in /runs/keep=8/seed=3", "keep=8.json exists", "batch_size.txt", "/a/seq_len"
    for name in ("data 'a.jsonl=0' or a=1", *names):
        assert as_flags(name) == name
