"""Where MTP layers are: found by the names of tensors, and nothing else is taken for one."""

from __future__ import annotations

from pathlib import Path

import pytest
from folders import saved, tensors_of
from mtps import EACH_ROW, FAMILIES, saved_with_mtp
from tiny import LAYERS, tiny_config

from reap.model import mtp
from reap.model.mtp import UnsupportedMtpError, find_mtp


def test_every_type_of_the_table_has_a_tiny_checkpoint() -> None:
    types = {name for family in mtp.FAMILIES for name in family.types}
    assert types - {"qwen3_5_moe_text"} == FAMILIES.keys()  # that one is inside qwen3_5_moe


@pytest.mark.parametrize("model_type", EACH_ROW)
def test_all_tensors_of_the_layer_are_known_and_no_other(model_type: str, tmp_path: Path) -> None:
    made = saved_with_mtp(tmp_path, model_type)
    found = find_mtp(made.model.config, tensors_of(tmp_path))
    assert found is not None and set(found.tensors) == set(made.mtp_tensors)
    assert made.names.experts.startswith(found.root + ".")
    parameters = {"embedding_norm.weight", "hidden_norm.weight", "projection.weight"}
    assert set(found.beside.values()) == parameters
    blocks = {new.split(".")[1] for new in found.inside.values() if new.startswith("layers.")}
    assert len(blocks) == len(made.names.blocks)
    block = next(i for i, name in enumerate(made.names.blocks) if name in made.names.experts)
    inner = made.names.experts.removeprefix(list(made.names.blocks)[block] + ".")
    assert found.in_file(f"layers.{block}.{inner}") == made.names.experts


def test_none() -> None:
    """Nothing past the last layer, or nothing with experts; nothing in a larger tower."""
    config = tiny_config("deepseek_v3")
    names = [f"model.layers.{i}.mlp.experts.0.up_proj.weight" for i in range(LAYERS)]
    dense = [f"model.layers.{LAYERS}.mlp.up_proj.weight", f"model.layers.{LAYERS}.eh_proj.weight"]
    tower = ["vision.layers.40.mlp.up_proj.weight"]
    assert find_mtp(config, []) is None
    assert find_mtp(config, [*names, *dense, *tower]) is None


def test_the_copies_of_embedding_and_head_are_not_loaded(tmp_path: Path) -> None:
    made = saved_with_mtp(tmp_path, "glm4_moe")
    last = f"model.layers.{LAYERS}"
    copies = [f"{last}.embed_tokens.weight", f"{last}.shared_head.head.weight"]
    tower = ["visual.layers.70.mlp.up_proj.weight"]
    found = find_mtp(made.model.config, [*tensors_of(tmp_path), *copies, *tower])
    assert found is not None and set(found.copied) == set(copies)


@pytest.mark.parametrize(
    ("model_type", "extra", "odd"),
    [
        ("deepseek_v3", f"model.layers.{LAYERS + 1}.mlp.experts.0.up_proj.weight", "layers.5"),
        ("deepseek_v3", f"model.layers.{LAYERS + 1}.mlp.up_proj.weight", "layers.5"),
        ("qwen3_next", "mtp.layers.1.mlp.experts.0.up_proj.weight", "mtp.layers.1"),
        ("nemotron_h", "mtp.layers.2.mixer.experts.0.up_proj.weight", "mtp.layers.2"),
        ("qwen3_next", "mtp.gain", "mtp.gain"),
    ],
)
def test_more_than_one_or_something_else_is_not_known(
    model_type: str, extra: str, odd: str, tmp_path: Path
) -> None:
    made = saved_with_mtp(tmp_path, model_type)
    with pytest.raises(UnsupportedMtpError, match=f"{odd}.*is none of the tensors of the one"):
        find_mtp(made.model.config, [*tensors_of(tmp_path), extra])


def test_a_family_that_is_not_in_the_table(tmp_path: Path) -> None:
    model = saved(tmp_path, "qwen3_moe")
    names = [*tensors_of(tmp_path), "mtp.layers.0.mlp.experts.0.up_proj.weight"]
    with pytest.raises(UnsupportedMtpError, match="mtp: it is not known how qwen3_moe models run"):
        find_mtp(model.config, names)
