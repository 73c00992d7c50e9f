"""Quantisation metadata names, afterwards, what became of the experts that it named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import EXPERTS, KEPT, plan_for
from test_surgery import checkpoint

from reap.checkpoint import quantisation
from reap.checkpoint.blocks import find_blocks
from reap.checkpoint.operation import operate
from reap.checkpoint.removal import removals_of
from reap.checkpoint.surgery import edits_of
from reap.errors import ReapError
from reap.files.folder import open_folder
from reap.planning.plan import Plan

M = "model.layers.{}.mlp.experts.{}.up_proj"


def tensors_of(layers: int = 2, experts: int = EXPERTS) -> dict[str, tuple[str, tuple[int, ...]]]:
    found: dict[str, tuple[str, tuple[int, ...]]] = {"lm_head.weight": ("BF16", (2, 2))}
    for layer in range(layers):
        for expert in range(experts):
            found[M.format(layer, expert) + ".weight"] = ("BF16", (4, 4))
        found[f"model.layers.{layer}.mlp.gate.weight"] = ("BF16", (experts, 4))
        found[f"model.layers.{layer}.self_attn.q_proj.weight"] = ("BF16", (4, 4))
    return found


def plan(layers: int = 2, **kept_of: tuple[int, ...]) -> Plan:
    names = [f"model.layers.{i}.mlp.experts" for i in range(layers)]
    made = plan_for(*names)
    kept = {**made.kept, **{names[int(key[1:])]: ids for key, ids in kept_of.items()}}
    return Plan(model=made.model, criterion="random", seed=0, kept=kept)


def renaming(made: Plan) -> quantisation.Renaming:
    tensors = tensors_of(len(made.kept))
    removals = removals_of(made, {"num_experts": EXPERTS}, tensors, find_blocks(tensors))
    return quantisation.Renaming.of(removals, tensors, edits_of(tensors, removals, ()))


SAME, OTHER = plan(), plan(l1=(2, 3, 4))  # layers that keep the same experts, and others
N = [[M.format(layer, expert) for expert in range(EXPERTS)] for layer in range(2)]


@pytest.mark.parametrize(
    ("key", "before", "after"),
    [
        # By exact name, with and without the prefix.
        ("ignore", [N[0][1], N[0][0], N[0][5], "lm_head"], [N[0][0], N[0][2], "lm_head"]),
        ("ignore", ["layers.1.mlp.experts.3.up_proj", "layers.1.mlp.experts.5"],
         ["layers.1.mlp.experts.1.up_proj"]),
        ("ignore", ["language_model.layers.0.mlp.experts.5"],
         ["language_model.layers.0.mlp.experts.2"]),
        # Whatever their numbers are: as it is.
        ("ignore", ["re:.*experts.*", "re:.*gate$", "re:.*layers\\.[01]\\..*", "Linear", "*gate*"],
         ["re:.*experts.*", "re:.*gate$", "re:.*layers\\.[01]\\..*", "Linear", "*gate*"]),
        ("ignore", [r"re:.*experts\.\d+\.up_proj"], [r"re:.*experts\.\d+\.up_proj"]),
        # Patterns of one expert.
        ("ignore", [r"re:.*layers\.0\.mlp\.experts\.5\..*"],
         [r"re:.*layers\.0\.mlp\.experts\.2\..*"]),
        ("ignore", [r"re:model\.layers\.0\.mlp\.experts\.4\..*"], []),
        ("ignore", [r"re:layers\.0\.mlp\.experts\.5\..*"], [r"re:layers\.0\.mlp\.experts\.2\..*"]),
        ("exclude_modules", ["model.layers.0.mlp.experts.2*"], ["model.layers.0.mlp.experts.1*"]),
        ("exclude_modules", ["*layers.0.mlp.experts.0.*"], []),
        ("modules_to_not_convert", ["layers.0.mlp.experts.5."], ["layers.0.mlp.experts.2."]),
        # Patterns of several: their names.
        ("ignore", [r"re:.*experts\.5\..*"], [N[0][2]]),
        ("ignore", [r"re:.*experts\.[23]\..*"], [N[0][1], N[1][0], N[1][1]]),
        ("ignore", [r"re:.*(q_proj|layers\.0.*experts\.5.*)"],
         [r"re:.*(q_proj|layers\.0.*experts\.2.*)"]),
        ("modules_to_not_convert", ["experts.2.up_proj"], [N[0][1], N[1][0]]),
        ("exclude_modules", ["*.experts.[0-2].*"], [N[0][0], N[0][1], N[1][0]]),
        ("dynamic", {r"-:.*experts\.2\..*": {}, "+:.*gate": {"bits": 8}},
         {"-:^" + re.escape(N[0][1]) + "$": {}, "-:^" + re.escape(N[1][0]) + "$": {},
          "+:.*gate": {"bits": 8}}),
        ("dynamic", {r"+:model\.layers\.0\..*experts\.2\..*": 1},
         {r"+:model\.layers\.0\..*experts\.1\..*": 1}),
        ("quantized_layers", {N[0][1]: {"quant_algo": "FP8"}, N[0][0]: {}},
         {N[0][0]: {"quant_algo": "FP8"}}),
        # By position.
        ("bits", dict.fromkeys("01", [1, 2, 3, 4, 5, 6]), {"0": [2, 3, 6], "1": [3, 4, 5]}),
        ("expert_bits", dict.fromkeys("01", [1, 2, 3, 4, 5, 6]), {"0": [2, 3, 6], "1": [3, 4, 5]}),
        ("layers", {"model.layers.1.mlp": {"experts": {str(i): i for i in range(6)}}},
         {"model.layers.1.mlp": {"experts": {"0": 2, "1": 3, "2": 4}}}),
        ("weight_block_size", [128, 128], [128, 128]),
        ("modules_in_block_to_quantize",
         [["self_attn.q_proj"], [f"mlp.experts.{i}.up_proj" for i in range(6)]],
         [["self_attn.q_proj"], [f"mlp.experts.{i}.up_proj" for i in range(3)]]),
    ],
)  # fmt: skip
def test_entries(key: str, before: Any, after: Any) -> None:
    config = {"ignore_me": [N[0][5]], "text_config": {"quantization_config": {key: before}}}
    written = renaming(OTHER).config(config)
    assert written == {**config, "text_config": {"quantization_config": {key: after}}}
    assert renaming(OTHER).config({"weight_quantization": {key: before}}) == {
        "weight_quantization": {key: after}
    }
    assert json.dumps(written) == json.dumps(
        {**config, "text_config": {"quantization_config": {key: after}}}
    ), "in the same order"


def test_layers_that_keep_the_same_experts_share_a_pattern() -> None:
    config = {"quantization_config": {"ignore": [r"re:.*experts\.5\..*", "experts.1."]}}
    new = renaming(SAME).config(config)["quantization_config"]["ignore"]
    assert new == [r"re:.*experts\.2\..*", "experts.0."]
    sizes = {"quantization_config": {"expert_bits": list(range(6))}}
    assert renaming(SAME).config(sizes)["quantization_config"]["expert_bits"] == list(KEPT)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("expert_bits", list(range(6)), r"expert_bits has 6 entries"),
        ("bits", list(range(6)), r"bits has 6 entries"),
        ("ignore", ["model.layers.0.mlp.experts.[25]*"], r"which can be read in two ways"),
        ("blocks", "model.layers.0.mlp.experts.1,model.layers.1", "blocks has .* names experts"),
        ("ignore", ["model.layers.0.mlp.experts[3].up_proj"], "ignore has .* names experts"),
        ("ignore", ["model/layers/0/mlp/experts/3"], "ignore has .* names experts"),
        ("ignore", ["model.layers.0.mlp.experts.0-3"], "ignore has .* names experts"),
        ("ignore", ["layers_0_experts_3"], "ignore has .* names experts"),
        ("fp16_experts", {"layer_0": [0, 5]}, "fp16_experts.layer_0 names experts by number"),
        ("layers", {"0": {"experts": {"0": 4, "5": 8}}}, "experts names experts by number"),
        ("modules_in_block_to_quantize", [["mlp.experts.1.up_proj"]], "for all layers alike"),
    ],
)
def test_what_cannot_be_told_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(ReapError, match=f"^config.json: quantization_config.*{message}") as caught:
        renaming(OTHER).config({"quantization_config": {key: value}})
    assert "\n" not in str(caught.value)


def test_names_of_layers_that_are_dropped_go_with_them() -> None:
    tensors = tensors_of(3)
    removals = removals_of(SAME, {"num_experts": EXPERTS}, tensors, find_blocks(tensors))
    edits = edits_of(tensors, removals, ("model.layers.2",))
    new = quantisation.Renaming.of(removals, tensors, edits)
    tree = {"ignore": [M.format(2, 1), M.format(1, 1), "re:.*layers.2.*"]}
    assert new.tree(tree, "f")["ignore"] == [M.format(1, 0)]


@pytest.mark.parametrize(
    "name",
    [
        "hf_quant_config.json",
        "quantize_config.json",
        "quantization_config.json",
        "quant_map.json",
        "qconfig.json",
    ],
)
def test_side_files(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    raw = checkpoint(folder, tensors_of())
    assert all(isinstance(data, np.ndarray) for data in raw.values())
    tree = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head", N[1][5]]}}
    (folder / name).write_text(json.dumps(tree))
    (folder / "other.json").write_text(json.dumps(tree))
    tree["quantization"]["exclude_modules"] = ["lm_head", N[1][2]]
    assert operate(open_folder(folder), SAME).rewritten == {name: tree}
    (folder / name).write_text(json.dumps({"modules": ["lm_head"]}))
    assert operate(open_folder(folder), SAME).rewritten == {}
    (folder / name).write_text(json.dumps({"experts": [[1] * EXPERTS]}))
    assert operate(open_folder(folder), SAME).rewritten == {name: {"experts": [[1] * 3]}}
    (folder / name).write_text(json.dumps({"experts": [1] * EXPERTS}))
    with pytest.raises(ReapError, match=f"^{name}: experts has 6 entries"):
        operate(open_folder(folder), OTHER)
