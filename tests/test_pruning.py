"""Pruned folders load like the originals and compute what the model with fewer experts computes."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from brute import run
from folders import add_tensors, edit_config, pruned_in_memory, saved, some_plan, tensors_of
from mtps import EACH_ROW, Checkpoint, saved_with_mtp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import model_types, tiny_inputs

import reap
from reap.checkpoint import pruning, surgery
from reap.checkpoint.pruning import prune
from reap.checkpoint.verification import verify
from reap.errors import ReapError
from reap.model.identity import describe_folder
from reap.model.load import load_model, load_mtp
from reap.planning.plan import Plan

# What each one adds: per-expert tensors, another naming, no router groups, groups with bias, fused
# and transposed with biases, linear attention and a shared expert, non-gated under another prefix,
# fused without `experts` in the name, a sub-config, experts beside the decoder layer, [1, E]
# statics, rows after the router's, token tables.
REPRESENTATIVE = (
    "qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "glm4_moe", "gpt_oss", "qwen3_next",
    "nemotron_h", "granitemoe", "qwen3_vl_moe", "gemma4", "ernie4_5_moe", "zaya", "jamba", "laguna",
)  # fmt: skip
# Text and vision experts in one numbering, but no statistics for the vision ones: refused.
REFUSED = {"ernie4_5_vl_moe"}


def check_same_logits(model: torch.nn.Module, plan: Plan, out: Path) -> None:
    loaded, report = type(model).from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    smaller = pruned_in_memory(model, plan)
    inputs = tiny_inputs(model)

    def logits(of: torch.nn.Module) -> torch.Tensor:
        torch.manual_seed(0)  # a diffusion model draws its canvas
        with torch.no_grad():
            return of(**inputs).logits

    ours, truth = logits(loaded.eval()), logits(smaller)
    # The same weights: only the order of a sum may differ, where loading changes memory layout.
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_loads_and_computes_what_the_smaller_model_does(model_type: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "base", model_type)
    plan = some_plan(tmp_path / "base")
    report = prune(tmp_path / "base", plan, tmp_path / "out")
    assert report.unchecked is None
    check_same_logits(model, plan, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type", sorted(set(model_types()) - set(REPRESENTATIVE) - {"deepseek_v4"})
)
def test_every_architecture(model_type: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "base", model_type)
    if model_type in REFUSED:
        with pytest.raises(ReapError, match="text and vision experts"):
            prune(tmp_path / "base", some_plan(tmp_path / "base"), tmp_path / "out")
        return
    plan = some_plan(tmp_path / "base")
    report = prune(tmp_path / "base", plan, tmp_path / "out")
    assert not report.mtp_layers and not report.dropped_layers
    check_same_logits(model, plan, tmp_path / "out")


def test_token_tables_name_only_kept_experts(tmp_path: Path) -> None:
    saved(tmp_path / "base", "deepseek_v4")
    plan = some_plan(tmp_path / "base")
    prune(tmp_path / "base", plan, tmp_path / "out")
    before, after = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "out")
    name = next(n for n in before if n.endswith("tid2eid"))
    kept = plan.kept["model.layers.0.mlp.experts"]
    for old, new in zip(before[name].tolist(), after[name].tolist(), strict=True):
        assert all(0 <= expert < len(kept) for expert in new)
        for was, now in zip(old, new, strict=True):
            assert was not in kept or kept.index(was) == now


def test_group_limited_routers_keep_their_groups(tmp_path: Path) -> None:
    model = saved(tmp_path / "base", "deepseek_v3", n_group=2, topk_group=1)
    plan = some_plan(tmp_path / "base", keep=4)
    prune(tmp_path / "base", plan, tmp_path / "out")
    check_same_logits(model, plan, tmp_path / "out")


def test_shards_keep_their_names_and_an_empty_one_goes(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    model = saved(base, shards=True)
    plan = some_plan(base)
    # A shard that holds nothing but a dropped expert has no reason to exist afterwards.
    tensors = tensors_of(base)
    layer = plan.model.layers[0].name
    gone = f"{layer}.{plan.dropped[layer][0]}.up_proj.weight"
    index = json.loads((base / "model.safetensors.index.json").read_text())
    home = index["weight_map"][gone]
    rest = {n: t for n, t in tensors.items() if index["weight_map"][n] == home and n != gone}
    save_file(rest, base / home, {"format": "pt"})
    save_file({gone: tensors[gone]}, base / "extra.safetensors", {"format": "pt"})
    index["weight_map"][gone] = "extra.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    plan = some_plan(base)
    prune(base, plan, out)
    names = {p.name for p in out.glob("*.safetensors")}
    assert names <= set(index["weight_map"].values()) and "extra.safetensors" not in names
    written = json.loads((out / "model.safetensors.index.json").read_text())
    after = tensors_of(out)
    assert written["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    assert written["metadata"]["total_parameters"] == sum(t.numel() for t in after.values())
    check_same_logits(model, plan, out)


def test_everything_else_is_copied_byte_for_byte(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    saved(base, tie_word_embeddings=True)
    kept = {"tokenizer.json": b"{}", "assets/deep/a.bin": b"\0\1", "README.md": b"# the base"}
    left = [
        "consolidated.safetensors",
        "pytorch_model.bin",
        "model-q4.gguf",
        ".git/config",
        "original/params.json",
    ]
    for name, data in {**kept, **dict.fromkeys(left, b"x")}.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(data)
    edit_config(base, strange={"rope": 1e-06, "ünï": [None, 10000000.0], "half a pair": "\ud800"})
    plan = some_plan(base)
    report = prune(base, plan, out, command="reap prune a b c")
    assert (out / "tokenizer.json").read_bytes() == b"{}"
    assert (out / "assets/deep/a.bin").read_bytes() == b"\0\1"
    assert (out / "README.base.md").read_bytes() == b"# the base"
    assert not any((out / name).exists() for name in left)
    assert {name.split("/")[0].rstrip("/") for name in report.left_out} == {
        n.split("/")[0] for n in left
    }
    old, new = (json.loads((d / "config.json").read_text()) for d in (base, out))
    key = next(k for k in old if old[k] != new[k])
    assert {**old, key: 5} == new and list(old) == list(new)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    before, after = tensors_of(base), tensors_of(out)
    for name in after:
        if "experts" not in name and "gate.weight" not in name:
            assert torch.equal(before[name], after[name])


def test_record_and_card_say_what_was_done(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    saved(base)
    plan = some_plan(base)
    prune(base, plan, out, command="reap prune base plan.json out")
    record = json.loads((out / "reap.json").read_text())
    assert {n: tuple(v["kept"]) for n, v in record["layers"].items()} == dict(plan.kept)
    assert record["command"] == "reap prune base plan.json out"
    assert record["base_model"]["weights"] == plan.model.weights
    card = (out / "README.md").read_text()
    front = card.split("---")[1]
    assert "base_model:" in front and "library_name: transformers" in front
    assert "pip install transformers accelerate" in card  # which device_map asks for
    assert "vllm serve out" in card and "38% of its experts" in card  # 3 of 8
    again = prune(out, some_plan(out, keep=4), tmp_path / "twice")
    assert json.loads((again.out / "reap.base.json").read_text()) == record
    assert (again.out / "README.base.md").read_text() == card
    last = prune(again.out, some_plan(again.out, keep=3), tmp_path / "thrice")
    assert json.loads((last.out / "reap.base.base.json").read_text()) == record
    assert (last.out / "README.base.base.md").read_text() == card


def test_layers_that_no_statistics_exist_for_are_dropped_and_said(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    model = saved(base, "deepseek_v3")
    extra = {
        f"model__layers__4__mlp__experts__{i}__up_proj__weight": torch.ones(20, 32)
        for i in range(8)
    }
    add_tensors(base, **extra, model__layers__4__enorm__weight=torch.ones(32))
    edit_config(base, num_nextn_predict_layers=1)
    plan = some_plan(base)
    report = prune(base, plan, out)
    assert report.dropped_layers == ("model.layers.4",)
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert json.loads((out / "reap.json").read_text())["dropped_layers"] == ["model.layers.4"]
    assert not any(n.startswith("model.layers.4.") for n in tensors_of(out))
    check_same_logits(model, plan, out)


@pytest.mark.parametrize("model_type", EACH_ROW)
def test_multi_token_prediction_is_kept_by_a_plan_that_speaks_of_it(
    model_type: str, tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    made = saved_with_mtp(base, model_type)
    plan = some_plan(base, keep=4, model=describe_folder(base, mtp=True))
    report = prune(base, plan, out)
    assert len(report.mtp_layers) == 1 and not report.dropped_layers
    assert f"multi-token prediction is kept: {report.mtp_layers[0]}" in str(report)
    assert json.loads((out / "reap.json").read_text())["mtp_layers"] == [*report.mtp_layers]
    assert "speculative decoding with it goes on" in (out / "README.md").read_text()
    check_mtp_tensors(made, plan.kept[made.names.experts], out)
    for found in (verify(out), verify(out, base)):
        assert found.mtp is not None and found.experts == dict.fromkeys(plan.kept, 4)
        assert not found.problems and not found.ignored and found.unchecked is None
    plain = describe_folder(base)
    kept = {layer.name: plan.kept[layer.name] for layer in plain.layers}
    without = prune(base, replace(plan, model=plain, kept=kept), tmp_path / "without")
    assert without.dropped_layers and not without.mtp_layers
    assert "a plan of statistics with it, as `reap calibrate` makes them" in str(without)
    logits = [run(load_model(folder), tiny_inputs(made.model)) for folder in (out, without.out)]
    assert torch.equal(*logits)


def check_mtp_tensors(made: Checkpoint, kept: tuple[int, ...], out: Path) -> None:
    """Those of experts that stay under their new numbers, the router's rows, the rest as it was."""
    after = {n: t for n, t in tensors_of(out).items() if n in made.mtp_tensors}
    assert after.keys() == replace(made, folder=out).mtp_tensors.keys()
    for name, tensor in after.items():
        expert = re.fullmatch(r"(.*\.experts\.)(\d+)(\..*)", name)
        before = made.mtp_tensors[
            f"{expert[1]}{kept[int(expert[2])]}{expert[3]}" if expert else name
        ]
        if tensor.shape != before.shape:
            assert before.shape[0] == 8, name
            before = before[list(kept)]
        assert torch.equal(tensor, before), name
    found = load_mtp(load_model(out))
    assert found is not None and found.layers[0].num_experts == len(kept)
    (experts,) = (one.module for one in found.experts)
    whole = load_mtp(load_model(made.folder))
    assert whole is not None
    for name, weight in whole.experts[0].module.named_parameters():
        assert torch.equal(experts.get_parameter(name), weight[list(kept)])


def test_a_dense_layer_for_multi_token_prediction_is_copied(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    model = saved(base, "ernie4_5_moe")
    add_tensors(
        base,
        model__mtp_block__0__mlp__up_proj__weight=torch.ones(24, 32),
        model__mtp_emb_norm__0__weight=torch.ones(32),
    )
    edit_config(base, num_nextn_predict_layers=1)
    plan = some_plan(base)
    report = prune(base, plan, out)
    assert not report.dropped_layers and not report.mtp_layers
    assert tensors_of(out)["model.mtp_block.0.mlp.up_proj.weight"].shape == (24, 32)
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 1
    check_same_logits(model, plan, out)


def test_quantisation_settings_that_name_experts_of_the_mtp_layer_follow(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    made = saved_with_mtp(base, "qwen3_next")
    plan = some_plan(base, keep=4, model=describe_folder(base, mtp=True))
    kept = plan.kept[made.names.experts]
    (gone,) = sorted(set(range(8)) - set(kept))[:1]
    names = [f"{made.names.experts}.{i}.up_proj" for i in (gone, kept[2])]
    ignored = {"quant_method": "compressed-tensors", "ignore": ["mtp.fc", *names]}
    edit_config(base, quantization_config=ignored)
    prune(base, plan, out)
    left = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert left == ["mtp.fc", f"{made.names.experts}.2.up_proj"]


def test_why_a_layer_for_multi_token_prediction_is_dropped(tmp_path: Path) -> None:
    saved(tmp_path / "base")
    names = {f"mtp__layers__0__mlp__experts__{i}__up_proj__weight": torch.ones(2) for i in range(8)}
    add_tensors(tmp_path / "base", **names)
    report = prune(tmp_path / "base", some_plan(tmp_path / "base"), tmp_path / "out")
    assert "for it: mtp (it is not known how qwen3_moe models run it)" in str(report)


def test_progress_hears_of_every_byte_of_tensors_and_files(tmp_path: Path) -> None:
    saved(tmp_path / "base", shards=True)
    (tmp_path / "base" / "tokenizer.json").write_bytes(b"12345")
    seen: list[int] = []
    report = prune(
        tmp_path / "base", some_plan(tmp_path / "base"), tmp_path / "out", progress=seen.append
    )
    others = sum(
        (tmp_path / "base" / n).stat().st_size for n in ("tokenizer.json", "generation_config.json")
    )
    assert sum(seen) == report.bytes_after + others
    assert report.bytes_after == sum(t.nbytes for t in tensors_of(tmp_path / "out").values())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    saved(tmp_path / "base", num_hidden_layers=2)
    return tmp_path / "base"


def refused(base: Path, plan: Plan, match: str, out: Path | None = None, **options: Any) -> None:
    out = out or base.parent / "out"
    before = sorted(base.parent.rglob("*"))
    with pytest.raises(ReapError, match=match) as caught:
        prune(base, plan, out, **options)
    assert "\n" not in str(caught.value)
    assert sorted(base.parent.rglob("*")) == before, "nothing may be left behind"


def test_not_a_model_folder(base: Path, tmp_path: Path) -> None:
    plan = some_plan(base)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", plan, "not a model folder")
    refused(tmp_path / "nowhere", plan, "not a folder")
    (tmp_path / "empty" / "config.json").write_text("{}")
    refused(tmp_path / "empty", plan, "not a model folder")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path / "empty", plan, "convert it to safetensors")


def test_dense_model(base: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    dense.mkdir()
    shutil.copy(base / "config.json", dense)
    save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(4, 4)}, dense / "model.safetensors")
    refused(dense, some_plan(base), "dense")


def test_experts_under_names_of_another_program(base: Path, tmp_path: Path) -> None:
    """MLX's; no table here knows them, which makes no dense model of it."""
    folder = tmp_path / "mlx"
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    names = {"mlp.gate.weight": (8, 32), "mlp.switch_mlp.up_proj.weight": (8, 16, 32)}
    tensors = {f"model.layers.0.{name}": torch.ones(*shape) for name, shape in names.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "mlx"})
    said = "counts 8 experts .*'model.layers.0.mlp.switch_mlp.up_proj.weight' may be .* as MLX"
    refused(folder, some_plan(base), said, tmp_path / "out")


def test_plan_of_another_model(base: Path, tmp_path: Path) -> None:
    saved(tmp_path / "other", num_hidden_layers=2, seed=1)
    refused(base, some_plan(tmp_path / "other"), "another model.*weights")
    saved(tmp_path / "bigger", num_hidden_layers=3)
    refused(base, some_plan(tmp_path / "bigger"), "layer")


def in_precision(base: Path, to: Path, kind: str, seed: int | None = None) -> Path:
    """The model of `base` with its experts stored as a release in another precision has them."""
    shutil.copytree(base, to)
    if seed is not None:
        saved(to, num_hidden_layers=2, seed=seed)
    tensors = {}
    for name, tensor in load_file(to / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if ".experts." not in name:
            tensors[name] = tensor
        elif kind == "fp8":
            tensors[name] = tensor.to(torch.float8_e4m3fn)
            tensors[f"{stem}.weight_scale_inv"] = torch.ones(1, 1)
        else:
            tensors[f"{stem}.qweight"] = torch.zeros(tensor.shape[1] // 8, tensor.shape[0]).int()
            tensors[f"{stem}.scales"] = torch.ones(1, tensor.shape[0], dtype=torch.float16)
            tensors[f"{stem}.g_idx"] = torch.zeros(tensor.shape[1]).int()
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    edit_config(to, quantization_config={"quant_method": kind}, max_position_embeddings=128)
    return to


@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_another_precision_of_the_model(base: Path, kind: str, tmp_path: Path) -> None:
    plan = some_plan(base)
    folder = in_precision(base, tmp_path / "quantised", kind)
    types = {"fp8": "F8_E4M3", "int4": "I32"}[kind]
    refused(folder, plan, f"not strictly.* another precision.*{types}", tmp_path / "o", strict=True)
    report = prune(folder, plan, tmp_path / "out")
    precision, positions = report.notes
    assert f"another precision of the same structure: F32 against {types}" in precision
    assert positions == "max_position_embeddings is 64 there and 128 here"
    assert f"note: {precision}" in str(report) and report.to_json()["notes"] == report.notes
    record = json.loads((tmp_path / "out" / "reap.json").read_text())
    assert record["notes"] == list(report.notes)
    assert not prune(base, plan, tmp_path / "same", strict=True).notes


def test_files_of_quantisers_follow(base: Path, tmp_path: Path) -> None:
    plan = some_plan(base)
    layer, kept = next(iter(plan.kept.items()))
    folder = in_precision(base, tmp_path / "quantised", "fp8")
    listed = [f"{layer}.{expert}.up_proj" for expert in range(8)]
    tree = {"quantization": {"exclude_modules": listed}}
    (folder / "hf_quant_config.json").write_text(json.dumps(tree))
    edit_config(folder, quantization_config={"quant_method": "fp8", "ignored_layers": listed})
    heard: list[int] = []
    report = prune(folder, plan, tmp_path / "out", progress=heard.append)
    assert sum(heard) == pruning.check_prune(folder, plan, tmp_path / "again")
    written = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    names = [f"{layer}.{i}.up_proj" for i in range(len(kept))]
    assert written == {"quantization": {"exclude_modules": names}}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["ignored_layers"] == names
    assert "quantisation: what names experts names those that stay" in report.config_changes


def test_another_precision_of_another_model(base: Path, tmp_path: Path) -> None:
    """The routers, which are in both as they were, tell."""
    other = in_precision(base, tmp_path / "quantised", "fp8", seed=1)
    refused(other, some_plan(base), "another model.*router .*gate.weight of F32", tmp_path / "out")


def test_plans_of_version_1_outlive_releases_of_transformers(base: Path, tmp_path: Path) -> None:
    weights = describe_folder(base).weights
    kept = {"kept": [0, 1, 2, 3], "dropped": [4, 5, 6, 7]}
    names = [f"model.layers.{i}.mlp.experts" for i in range(2)]
    groups = {"n_group": 1, "topk_group": 1, "min_per_group": 1}
    data: dict[str, Any] = {
        "format": "reap-plan",
        "version": 1,
        "model": {
            "model_type": "qwen3_moe",
            "name": "base",
            "fingerprint": "5" * 64,  # of the defaults of another release
            "weights": weights,
            "layers": [{"name": n, "num_experts": 8, "top_k": 2, **groups} for n in names],
        },
        "criterion": "reap",
        "seed": 0,
        "layers": dict.fromkeys(names, kept),
        "options": {"ratio": "0.5"},
        "calibration": {"versions": {"transformers": "5.6.0"}},
    }
    report = prune(base, Plan.from_json(json.dumps(data)), tmp_path / "out")
    assert ["earlier version" in note for note in report.notes] == [True]
    data["model"]["weights"] = None
    assert prune(base, Plan.from_json(json.dumps(data)), tmp_path / "out", overwrite=True).notes
    data["model"]["weights"] = "0" * 64
    other = Plan.from_json(json.dumps(data))
    refused(base, other, "another model .*other weights.*calibrate again", tmp_path / "o")
    data["model"]["weights"] = weights
    data["calibration"]["versions"]["transformers"] = describe_folder(base).transformers
    other = Plan.from_json(json.dumps(data))
    refused(base, other, "another model .*a field of the configuration", tmp_path / "o")


def test_a_plan_of_more_experts_than_the_folder_has(base: Path, tmp_path: Path) -> None:
    plan = some_plan(base)
    prune(base, plan, tmp_path / "out")
    refused(tmp_path / "out", plan, "another model .*num_experts 8 against 5", tmp_path / "again")
    with pytest.raises(ReapError, match="num_experts 8 against 5"):
        pruning.check_prune(tmp_path / "out", plan, tmp_path / "again")
    saved(tmp_path / "glm", "glm4_moe")
    refused(tmp_path / "glm", plan, "qwen3_moe against glm4_moe", tmp_path / "again")


def test_output_that_exists_or_lies_in_the_model(base: Path, tmp_path: Path) -> None:
    plan = some_plan(base)
    (tmp_path / "out").mkdir()
    refused(base, plan, "exists")
    refused(base, plan, "output .* is .*base, which is read", out=base)
    refused(base, plan, "output .* lies in .*base", out=base / "inner")
    refused(base, plan, "output .* holds .*base", out=tmp_path, overwrite=True)
    (tmp_path / "file").write_text("")
    refused(base, plan, "not a folder", out=tmp_path / "file", overwrite=True)
    (tmp_path / "out" / ".git").mkdir()
    refused(base, plan, "repository", overwrite=True)


def test_overwrite_replaces_the_folder(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "model-00001-of-00002.safetensors").write_text("old")
    (base / "assets").mkdir()
    (base / "assets" / "odd.bin").write_bytes(b"carried over")
    prune(base, some_plan(base), out, overwrite=True)
    assert not (out / "model-00001-of-00002.safetensors").exists() and (out / "reap.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]
    prune(base, some_plan(base, keep=4), out, overwrite=True)  # its record names odd.bin
    (out / "results.csv").write_text("of a week")
    refused(base, some_plan(base), "results.csv is not part of a model", overwrite=True)


def test_what_appears_in_the_output_meanwhile_is_kept(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune(base, some_plan(base), out)

    def disturb(n: int) -> None:
        (out / "notes.txt").write_text("of today")

    with pytest.raises(ReapError, match="notes.txt is not part of a model"):
        prune(base, some_plan(base, keep=4), out, overwrite=True, progress=disturb)
    assert (out / "notes.txt").exists() and (out / "reap.json").exists()


def test_no_room(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(base, some_plan(base), "needs 16.* MB, 16.* MB of it to spare, but .* 1.00 kB free")


def test_a_plan_that_drops_nothing(base: Path, tmp_path: Path) -> None:
    plan = some_plan(base, keep=8)
    refused(base, plan, "drops no expert: .*out would be a copy .*allow_copy=True")
    report = prune(base, plan, tmp_path / "out", allow_copy=True)
    assert "this is a copy" in str(report)
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()


def test_unknown_tensor_with_an_expert_axis(base: Path) -> None:
    add_tensors(base, model__layers__0__mlp__mystery=torch.ones(8, 3))
    refused(base, some_plan(base), "do not know what 'model.layers.0.mlp.mystery'")


def test_missing_expert(base: Path) -> None:
    tensors = {n: t for n, t in tensors_of(base).items() if ".0.mlp.experts.7." not in n}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    refused(base, some_plan(base), "7 experts")


def test_config_that_does_not_count(base: Path) -> None:
    plan = some_plan(base)
    config = json.loads((base / "config.json").read_text())
    key = next(k for k in config if re.fullmatch("num_(local_)?experts", k))
    config["renamed"] = config.pop(key)
    (base / "config.json").write_text(json.dumps(config))
    refused(base, plan, "does not say")


def test_transformers_own_loader_is_asked(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config that was not edited fits no pruned tensor, and only building the model can tell."""
    plan = some_plan(base)
    monkeypatch.setattr("reap.checkpoint.counts.with_fewer", lambda config, *_: (dict(config), []))
    refused(base, plan, "wrong shape")


def test_experts_that_do_not_number_from_0_are_caught(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The written names are held against the removals, not against the edits they came from."""
    real = surgery.edits_of

    def shifted(*args: Any) -> dict[str, surgery.Edit | None]:
        return {
            name: edit and replace(edit, name=edit.name.replace(".experts.0.", ".experts.9."))
            for name, edit in real(*args).items()
        }

    monkeypatch.setattr(surgery, "edits_of", shifted)
    monkeypatch.setattr(pruning, "_check_shapes", lambda *_: None)
    refused(base, some_plan(base), r"verification failed: .* has the experts \[1, 2, 3, 4, 9\]")


def test_links_to_the_model_are_followed_and_others_are_not(base: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "abc"
    blobs = tmp_path / "models--org--tiny" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in base.iterdir():
        shutil.copy(file, blobs / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    prune(snapshot, some_plan(snapshot), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "reap.json").read_text())["base_model_name"] == "org/tiny"
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    (tmp_path / "secret").write_text("secret")
    (base / "notes.txt").symlink_to(tmp_path / "secret")
    refused(base, some_plan(base), "away from the model's files", out=tmp_path / "second")
    (base / "notes.txt").unlink()
    farm = tmp_path / "farm"
    farm.mkdir()
    for file in base.iterdir():
        (farm / file.name).symlink_to(file)
    prune(farm, some_plan(farm), tmp_path / "third")
    assert not any(p.is_symlink() for p in (tmp_path / "third").iterdir())
    # The links lead to what would be replaced.
    refused(farm, some_plan(farm), "output .*base holds", out=base, overwrite=True)


def test_a_pipe_is_no_shard(base: Path, tmp_path: Path) -> None:
    plan = some_plan(base)
    (base / "model.safetensors").unlink()
    os.mkfifo(base / "model.safetensors")
    refused(base, plan, "not a regular file")


def test_a_folder_that_cannot_be_read(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files would silently be missing from the pruned model."""
    plan, real = some_plan(base), os.scandir
    (base / "locked").mkdir()

    def scandir(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, os.strerror(13), path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ReapError, match="cannot read .*locked: Permission denied"):
        prune(base, plan, base.parent / "out")


def test_top_level_name() -> None:
    assert reap.prune is prune
