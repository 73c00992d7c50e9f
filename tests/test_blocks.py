"""Blocks of experts are found by the structure of tensor names, whatever their modules' names."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from reap.checkpoint.blocks import (
    Block,
    ExpertTensor,
    experts_in,
    extra_prefix,
    find_blocks,
    resolve,
)
from reap.errors import ReapError

NAMES = (
    "model.embed.weight",
    "model.layers.1.mlp.experts.0.up.weight",
    "model.layers.1.mlp.experts.1.up.weight",
    "model.layers.1.mlp.gate.weight",
    "model.layers.2.moe.up_proj.weight",
    "model.layers.3.block_sparse_moe.input_linear.weight",
    "model.layers.4.experts.gate_up_proj",
    "model.layers.4.experts.scale",
)


def test_a_block_is_what_the_names_show() -> None:
    blocks = find_blocks(NAMES)
    assert list(blocks) == [
        "model.layers.1.mlp", "model.layers.2.moe", "model.layers.3.block_sparse_moe",
        "model.layers.4",
    ]  # fmt: skip
    each = tuple(ExpertTensor(NAMES[1 + i], i, ".up.weight") for i in range(2))
    assert blocks["model.layers.1.mlp"] == Block(
        "model.layers.1.mlp", "model.layers.1", 1, each, frozenset()
    )
    assert blocks["model.layers.1.mlp"].ids == {0, 1}
    assert blocks["model.layers.4"] == Block(
        "model.layers.4", "model.layers.4", 4, (), frozenset(NAMES[6:])
    )
    assert {block.stack for block in blocks.values()} == {"model.layers"}


def test_an_expert_that_is_a_tensor_itself() -> None:
    (block,) = find_blocks(["layers.0.mlp.experts.3"]).values()
    assert block.experts == (ExpertTensor("layers.0.mlp.experts.3", 3, ""),)


def test_a_block_never_changes() -> None:
    blocks = find_blocks(NAMES)
    assert (
        blocks == find_blocks(NAMES) and len({*blocks.values(), *find_blocks(NAMES).values()}) == 4
    )
    for block in blocks.values():
        for field in vars(block):
            with pytest.raises(FrozenInstanceError):
                setattr(block, field, getattr(block, field))


def test_a_block_without_a_layer_number() -> None:
    with pytest.raises(ReapError, match="cannot tell the layer of the experts of 'model.mlp'"):
        find_blocks(["model.mlp.experts.0.up.weight"])


def test_the_number_of_experts_is_that_of_the_tensors() -> None:
    shapes = {
        **dict.fromkeys(NAMES, ("BF16", (7, 4))), "model.layers.4.experts.scale": ("F32", ()),
    }  # fmt: skip
    assert [experts_in(block, shapes) for block in find_blocks(shapes).values()] == [2, 7, 7, 7]


@pytest.mark.parametrize(
    ("module", "prefix"),
    [
        ("model.layers.3.mlp", None),
        ("model.layers.4.mlp", "model.layers.4"),
        ("model.vision.4.mlp", None),
        ("model.mtp.0.mlp", "model.mtp"),
        ("nextn_layers.0.mlp", "nextn_layers"),
    ],
)
def test_layers_for_multi_token_prediction(module: str, prefix: str | None) -> None:
    (block,) = find_blocks([f"{module}.experts.0.up.weight"]).values()
    assert extra_prefix(block, {"model.layers"}, depth=4) == prefix


@pytest.mark.parametrize(
    ("layer", "modules", "found"),
    [
        ("model.layers.3.mlp.experts", ["language_model.model.layers.3.mlp"], 0),
        (
            "model.layers.3.mlp.experts",
            ["model.layers.2.mlp", "model.layers.3.block_sparse_moe"],
            1,
        ),
        ("model.layers.0.mlp.experts", ["mtp.layers.0.mlp", "model.layers.0.mlp"], 1),
        ("mtp.layers.0.mlp.experts", ["model.layers.0.mlp", "mtp.layers.0.mlp"], 1),
        (
            "model.vision_tower.blocks.3.mlp.experts",
            ["model.layers.3.mlp", "vision.blocks.3.mlp"],
            1,
        ),
        (
            "thinker.model.layers.3.mlp.experts",
            ["talker.model.layers.3.mlp", "thinker.model.layers.3.mlp"],
            1,
        ),
        (
            "model.layers.3.mlp.experts",
            ["talker.model.layers.3.mlp", "thinker.model.layers.3.mlp"],
            None,
        ),
        ("model.layers.3.mlp.experts", ["model.layers.4.mlp"], None),
    ],
)
def test_layers_find_their_blocks(layer: str, modules: list[str], found: int | None) -> None:
    blocks = find_blocks(f"{module}.experts.0.w1.weight" for module in modules)
    if found is None:
        with pytest.raises(ReapError, match="ambiguous|no experts for layer"):
            resolve(layer, blocks)
    else:
        assert resolve(layer, blocks).module == modules[found]
