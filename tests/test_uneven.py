"""Checkpoints whose layers keep different numbers of experts: ours load them, others refuse."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from brute import run
from folders import COUNT_KEYS, edit_config, saved, some_plan
from mtps import saved_with_mtp
from tiny import model_types, tiny_inputs
from transformers import AutoConfig, AutoModelForCausalLM

import reap
from reap.checkpoint.pruning import prune
from reap.checkpoint.verification import verify
from reap.errors import ReapError
from reap.model.identity import describe, describe_folder
from reap.model.load import load_tokenizer
from reap.model.uneven import KEY, MODEL_TYPE, counts_in, restored, written
from reap.planning.plan import Plan
from reap.runs.masking import masked

# Experts in tensors of their own, rows of all experts, a count read off the configuration, tied
# layers.
REPRESENTATIVE = ("qwen3_moe", "dbrx", "zaya", "diffusion_gemma")
REFUSED = {"ernie4_5_vl_moe"}


def uneven(plan: Plan) -> Plan:
    """A plan that drops none, one and two more of every third layer."""
    number = {name: re.findall(r"\d+", name)[-1] for name in plan.kept}  # one of tied layers
    fewer = {one: i % 3 for i, one in enumerate(dict.fromkeys(number.values()))}
    kept = {name: ids[: len(ids) - fewer[number[name]]] for name, ids in plan.kept.items()}
    return replace(plan, kept=kept)


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(0)  # a diffusion model draws its canvas
    return run(model, tiny_inputs(model))


def check(tmp_path: Path, model_type: str) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    kind = type(saved(base, model_type))
    model, plan = kind.from_pretrained(base).eval(), uneven(some_plan(base))
    if plan.uniform:
        pytest.skip("one MoE layer")
    prune(base, plan, out, verify=False)
    loaded = reap.load_model(out)
    with masked(model, plan):
        truth = logits(model)
    torch.testing.assert_close(logits(loaded), truth, rtol=1e-5, atol=1e-5)
    kept = [len(ids) for ids in plan.kept.values()]
    for found in (describe(loaded), describe_folder(out)):
        assert [layer.num_experts for layer in found.layers] == kept
    assert describe(loaded).difference(describe_folder(out)) is None
    with pytest.raises(Exception, match=f"see {KEY}|str|argument"):
        kind.from_pretrained(out)  # whatever a configuration, or torch, says of the number


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_loads_and_computes_what_the_mask_does(model_type: str, tmp_path: Path) -> None:
    check(tmp_path, model_type)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type", sorted({*model_types(), "llama4_text"} - {*REPRESENTATIVE} - REFUSED)
)
def test_every_architecture(model_type: str, tmp_path: Path) -> None:
    check(tmp_path, model_type)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Plan]:
    """A model, what an uneven plan makes of it, and the plan."""
    folder = tmp_path_factory.mktemp("uneven")
    saved(folder / "base")
    plan = uneven(some_plan(folder / "base"))
    prune(folder / "base", plan, folder / "out", command="reap prune base plan out")
    return folder / "base", folder / "out", plan


def test_others_refuse_it(folders: tuple[Path, Path, Plan]) -> None:
    """By its type, and where somebody insists on the class by the number (see `check`)."""
    _, out, _ = folders
    for auto in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=MODEL_TYPE):
            auto.from_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["ReapExpertsPerLayer"]


def test_its_tokenizer_loads_without_a_word(tmp_path: Path) -> None:
    """transformers looks at the model's type, of which it would warn."""
    base = Path(__file__).parent.parent / "models" / "tiny-qwen3-moe"
    prune(base, uneven(some_plan(base, 12)), tmp_path / "out")
    program = "import sys; from pathlib import Path; from reap.model.load import load_tokenizer\n"
    program += "print(load_tokenizer(Path(sys.argv[1]))('words')['input_ids'])"
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert told.stdout == f"{load_tokenizer(base)('words')['input_ids']}\n" and told.stderr == ""


def test_record_card_and_verification(folders: tuple[Path, Path, Plan]) -> None:
    base, out, plan = folders
    card = (out / "README.md").read_text()
    assert 'reap.load_model("out")' in card and "vllm serve" not in card
    assert "transformers, vLLM and others refuse it" in card
    record = json.loads((out / "reap.json").read_text())
    assert record["loaded_by"] == "reap" and any(KEY in line for line in record["config_changes"])
    for found in (verify(out), verify(out, base)):
        assert not found.problems and found.unchecked is None
        assert list(found.experts.values()) == [len(ids) for ids in plan.kept.values()]
        assert found.expert_parallel == (1,)  # of 5, 4 and 3 experts


def test_pruned_again(folders: tuple[Path, Path, Plan], tmp_path: Path) -> None:
    """Unevenly once more, and to equal numbers: then the words are the architecture's again."""
    _, out, _ = folders
    info = describe_folder(out)
    kept = {
        layer.name: tuple(range(layer.num_experts - (i % 2))) for i, layer in enumerate(info.layers)
    }
    again = Plan(info, "random", 0, kept)
    prune(out, again, tmp_path / "again", verify=False)
    model = reap.load_model(out)
    with masked(model, again):
        assert torch.equal(logits(model), logits(reap.load_model(tmp_path / "again")))
    equal = Plan(info, "random", 0, {name: ids[:3] for name, ids in kept.items()})
    prune(out, equal, tmp_path / "equal", verify=False)
    config = json.loads((tmp_path / "equal" / "config.json").read_text())
    assert 3 in [config.get(key) for key in COUNT_KEYS]
    assert KEY not in config and config["model_type"] == "qwen3_moe"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "equal")
    with masked(model, equal):
        assert torch.equal(logits(model), logits(stock))


def test_calibrating_and_observing(folders: tuple[Path, Path, Plan]) -> None:
    _, out, plan = folders
    model = reap.load_model(out)
    with reap.observe(model) as stats:
        logits(model)
    assert [len(stats.layer(name).count) for name in plan.kept] == [
        len(ids) for ids in plan.kept.values()
    ]
    assert reap.make_plan(stats, keep=2).uniform


def test_multi_token_prediction_keeps_the_largest_number(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    saved_with_mtp(base, "glm4_moe")
    plan = some_plan(base, model=describe_folder(base, mtp=True))
    *_, last = plan.kept
    few = replace(plan, kept={**plan.kept, last: plan.kept[last][:3]})
    with pytest.raises(ReapError, match="as many experts as the largest layer, 5, not 3"):
        prune(base, few, tmp_path / "few")
    first = next(iter(plan.kept))
    most = replace(plan, kept={**plan.kept, first: plan.kept[first][:3]})
    prune(base, most, tmp_path / "most", verify=False)
    model = reap.load_model(tmp_path / "most")
    mtp = reap.load_mtp(model)
    assert mtp is not None and mtp.layers[0].num_experts == 5


def test_code_that_is_not_run_has_one_number(tmp_path: Path) -> None:
    saved(tmp_path / "base")
    plan = uneven(some_plan(tmp_path / "base"))
    edit_config(tmp_path / "base", model_type="odd", architectures=["Odd"])
    odd = replace(plan, model=replace(plan.model, model_type="odd"))
    with pytest.raises(ReapError, match="one number of experts for all layers|is not usable"):
        prune(tmp_path / "base", odd, tmp_path / "out")


def test_words() -> None:
    plain = {"model_type": "m", "architectures": ["A"], "num_experts": 5}
    ours = written(plain, {"a": 5, "b": 3}, [("num_experts",)])
    assert ours["num_experts"] == f"see {KEY}" and counts_in(ours) == {"a": 5, "b": 3}
    assert "model_type" not in ours[KEY], "transformers would take it for the configuration"
    assert {k: v for k, v in restored(ours).items() if k != KEY} == plain
    assert written(ours, {}, ()) == plain and counts_in(plain) == {}
    inner = {"model_type": "m", "text_config": {"num_experts": 5}}
    bare = written(inner, {"a": 5, "b": 3}, [("text_config", "num_experts")])
    assert bare["text_config"] == {"num_experts": f"see {KEY}"}
    assert restored(bare)["architectures"] is None
    assert restored(bare)["text_config"] == inner["text_config"] == {"num_experts": 5}


@pytest.mark.parametrize(
    "damage",
    [
        {KEY: None},
        {KEY: {}},
        {KEY: {"of_model_type": "m", "of_architectures": None, "experts": {}}},
        {KEY: {"of_model_type": "m", "of_architectures": None, "experts": {"a": 0}}},
        {KEY: {"of_model_type": "m", "of_architectures": None, "experts": {"a": 1}}},
        {KEY: {"of_model_type": "m", "of_architectures": None, "experts": {"a": 1}, "largest": 3}},
        {KEY: {"of_model_type": 3, "of_architectures": None, "experts": {"a": 1}}},
    ],
)
def test_damaged_words(damage: dict[str, Any]) -> None:
    with pytest.raises(ReapError, match="is damaged: write the checkpoint again"):
        restored({"model_type": MODEL_TYPE, **damage})


def test_a_config_of_another_depth(folders: tuple[Path, Path, Plan], tmp_path: Path) -> None:
    _, out, _ = folders
    config = json.loads((out / "config.json").read_text())
    config[KEY]["experts"].popitem()
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(out / "model.safetensors")
    with pytest.raises(ReapError, match="counts the experts of 3 layers, .* has 4 MoE layers"):
        reap.load_model(tmp_path)
