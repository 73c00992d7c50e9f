"""One description of what happens to a block: never changed, and all else follows from it."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from folders import EXPERTS, KEPT, plan_for

from reap.checkpoint import counts, removal, surgery
from reap.checkpoint.blocks import find_blocks
from reap.checkpoint.counts import Place
from reap.checkpoint.removal import (
    Modalities,
    Modality,
    Removal,
    kept_by_place,
    mtp_layers,
    removals_of,
)
from reap.errors import ReapError
from reap.planning.plan import Plan

Tensors = dict[str, tuple[str, tuple[int, ...]]]
LAYER = "model.layers.1.mlp"
CONFIG = {"num_experts": EXPERTS, "num_hidden_layers": 2}
TWO = [f"model.layers.1.mlp.{kind}_moe.experts" for kind in ("text", "vision")]
OTHERS = (0, 3, 4)  # kept of the second of two modalities


def block_of(experts: int = EXPERTS, module: str = LAYER) -> Tensors:
    names = [f"{module}.experts.{i}.up_proj.weight" for i in range(experts)]
    return {
        **dict.fromkeys(names, ("BF16", (2, 3))),
        f"{module}.gate.weight": ("F32", (EXPERTS, 3)),
    }


def two_modalities() -> Tensors:
    """As ERNIE-VL has them: routers [H, E] and a bias [2, E]."""
    return {
        **block_of(2 * EXPERTS),
        f"{LAYER}.gate.weight": ("F32", (5, EXPERTS)),
        f"{LAYER}.gate.weight_1": ("F32", (5, EXPERTS)),
        f"{LAYER}.moe_statics.e_score_correction_bias": ("F32", (2, EXPERTS)),
    }


def keeping(*kept: tuple[int, ...], names: list[str]) -> Plan:
    return replace(plan_for(*names), kept=dict(zip(names, kept, strict=True)))


def built(plan: Plan, shapes: Tensors, config: dict[str, Any] | None = None) -> tuple[Removal, ...]:
    return removals_of(plan, config or CONFIG, shapes, find_blocks(shapes))


def test_everything_about_a_block_is_in_its_removal() -> None:
    shapes = block_of()
    (found,) = built(plan_for(f"{LAYER}.experts", model_type="zaya"), shapes)
    assert found == Removal(
        block=find_blocks(shapes)[LAYER],
        layers=(f"{LAYER}.experts",),
        total=EXPERTS,
        kept=KEPT,
        places=(Place((), "num_experts", None),),
        modalities=None,
        model_type="zaya",
    )
    assert found.kept_by_modality == (KEPT,)
    assert kept_by_place([found]) == {found.places[0]: {1: len(KEPT)}}


@pytest.mark.parametrize("modalities", [False, True])
def test_a_removal_never_changes_and_is_the_same_when_built_again(modalities: bool) -> None:
    shapes = two_modalities() if modalities else block_of()
    plan = keeping(KEPT, OTHERS, names=TWO) if modalities else plan_for(f"{LAYER}.experts")
    first, again = built(plan, shapes), built(plan, shapes)
    assert first == again and hash(first) == hash(again)
    for field in vars(first[0]):
        with pytest.raises(FrozenInstanceError):
            setattr(first[0], field, getattr(first[0], field))
    assert surgery.edits_of(shapes, first, ()) == surgery.edits_of(shapes, first, ())
    assert first == again, "reading off it leaves it as it was"


def test_layers_that_share_a_block_are_one_removal() -> None:
    names = ["encoder.layers.1.mlp.experts", "decoder.layers.1.mlp.experts"]
    (found,) = built(plan_for(*names), block_of())
    assert found.layers == tuple(names) and found.kept == KEPT and found.total == EXPERTS
    with pytest.raises(ReapError, match="share their weights: the plan must keep the same experts"):
        built(keeping(KEPT, OTHERS, names=names), block_of())


def test_two_modalities_are_numbered_one_after_another() -> None:
    for names, kept in ((TWO, (KEPT, OTHERS)), (TWO[::-1], (OTHERS, KEPT))):
        (found,) = built(keeping(*kept, names=names), two_modalities())
        assert found.total == 2 * EXPERTS
        assert found.kept == (*KEPT, *(EXPERTS + i for i in OTHERS))
        assert found.kept_by_modality == (KEPT, OTHERS)
        assert kept_by_place([found]) == {found.places[0]: {1: 3}}, "counted within a modality"


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (TWO[:1], (KEPT,)),
        (TWO[1:], (KEPT,)),
        (TWO, (KEPT, (0, 1))),
        ([*TWO, f"{LAYER}.vision_moe.again"], (KEPT, OTHERS, OTHERS)),
        ([f"{LAYER}.experts", f"{LAYER}.text_moe.experts"], (KEPT, KEPT)),
    ],
)
def test_a_plan_that_does_not_speak_of_both_modalities_alike(
    names: list[str], kept: tuple[tuple[int, ...], ...]
) -> None:
    with pytest.raises(ReapError, match="text and vision experts .* both and keep equally many"):
        built(keeping(*kept, names=names), two_modalities())


@pytest.mark.parametrize(
    ("tail", "shape", "wanted"),
    [
        ("gate.weight_1", None, r"\(None, 6\) .* no tensor"),  # the plan's words tell, too
        ("gate.weight", (EXPERTS, 5), r"\(None, 6\) .* \(6, 5\)"),
        ("moe_statics.e_score_correction_bias", (EXPERTS, 2), r"\(2, 6\) .* \(6, 2\)"),
    ],
)
def test_routers_of_modalities_with_another_shape(
    tail: str, shape: tuple[int, ...] | None, wanted: str
) -> None:
    shapes = two_modalities()
    if shape is None:
        del shapes[f"{LAYER}.{tail}"]
    else:
        shapes[f"{LAYER}.{tail}"] = ("F32", shape)
    removals = built(keeping(KEPT, OTHERS, names=TWO), shapes)
    with pytest.raises(ReapError, match=f"{LAYER}.{tail}' must have the shape {wanted}"):
        surgery.edits_of(shapes, removals, ())


def test_modalities_are_rows_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """No function knows their names: a made-up row works, and ERNIE-VL does not without its row."""
    made_up = Modalities(
        each=(Modality("slow", "slow", "router.a", 0), Modality("fast", "fast", "router.b", 1)),
        bias="router.both",
    )
    monkeypatch.setattr(removal, "MODALITIES", (made_up,))
    with pytest.raises(ReapError, match="share their weights"):
        built(keeping(KEPT, OTHERS, names=TWO), two_modalities())
    shapes: Tensors = {
        **{n: t for n, t in block_of(2 * EXPERTS).items() if "gate" not in n},
        f"{LAYER}.router.a": ("F32", (EXPERTS, 5)),
        f"{LAYER}.router.b": ("F32", (5, EXPERTS)),
        f"{LAYER}.router.both": ("F32", (2, EXPERTS)),
    }
    names = [f"{LAYER}.{kind}.experts" for kind in ("fast", "slow")]
    removals = built(keeping(OTHERS, KEPT, names=names), shapes)
    both = (*KEPT, *(EXPERTS + i for i in OTHERS))
    assert removals[0].kept == both
    edits = surgery.edits_of(shapes, removals, ())
    name = f"{LAYER}.router.a"
    assert edits[name] == surgery.Edit(name, (3, 5), KEPT, 1, EXPERTS)
    name = f"{LAYER}.router.b"
    assert edits[name] == surgery.Edit(name, (5, 3), OTHERS, 5, EXPERTS)
    name = f"{LAYER}.router.both"
    assert edits[name] == surgery.Edit(name, (2, 3), both, 1, 2 * EXPERTS)
    shapes[f"{LAYER}.router.b"] = ("F32", (EXPERTS, 5))
    with pytest.raises(ReapError, match=r"router.b' must have the shape \(None, 6\)"):
        surgery.edits_of(shapes, removals, ())


def test_blocks_that_the_plan_does_not_speak_of() -> None:
    """Layers for multi-token prediction go; experts that a number of the plan counts too do not."""
    plan = plan_for(f"{LAYER}.experts")
    extra = block_of(module="model.layers.2.mlp") | block_of(module="mtp.layers.0.mlp")
    shapes = block_of() | extra
    removals = built(plan, shapes)
    found = mtp_layers(CONFIG, shapes, find_blocks(shapes), removals)
    assert found.dropped == ("model.layers.2", "mtp") and found.kept == ()
    edits = surgery.edits_of(shapes, removals, found.dropped)
    assert all(edits[name] is None for name in extra)
    shapes = block_of() | block_of(module="vision.layers.0.mlp")
    with pytest.raises(ReapError, match="vision.layers.0.mlp has experts that the plan does not"):
        mtp_layers(CONFIG, shapes, find_blocks(shapes), built(plan, shapes))


def test_layers_for_multi_token_prediction_that_the_plan_speaks_of_stay() -> None:
    """Numbered on or apart; what is numbered apart is in none of the model's own lists."""
    apart, on = "mtp.layers.1.mlp", "model.layers.2.mlp"
    shapes = block_of() | block_of(module=apart) | block_of(module=on)
    names = [f"{module}.experts" for module in (LAYER, apart, on)]
    config = {"num_experts": [0, EXPERTS], "num_hidden_layers": 2}
    plan = keeping(KEPT, OTHERS, OTHERS, names=names)
    removals = built(plan, shapes, {**config, "num_experts": EXPERTS})
    assert [removal.block.module for removal in removals] == [LAYER, apart, on]
    found = mtp_layers(CONFIG, shapes, find_blocks(shapes), removals)
    assert found.kept == ("model.layers.2", "mtp") and found.dropped == ()
    assert kept_by_place(removals) == {Place((), "num_experts", None): {1: 3, -1: 3, 2: 3}}
    unlike = built(keeping(KEPT, (0, 1), KEPT, names=names), shapes)
    new = dict.fromkeys((1, -1, 2), 3)
    assert counts.with_fewer(config, {Place((), "num_experts", None): new}, False)[0] == {
        "num_experts": [0, 3],
        "num_hidden_layers": 2,
    }
    (place, kept), *_ = kept_by_place(unlike).items()
    assert counts.is_uneven(CONFIG, place, kept)
    assert not counts.is_uneven(CONFIG, place, new)
    assert not counts.is_uneven(config, place, kept), "a list has a number for each"
    assert counts.with_fewer(CONFIG, {place: kept}, False)[0]["num_experts"] == 3, "the largest"


def test_a_layer_for_multi_token_prediction_of_which_a_part_is_planned() -> None:
    both = [f"mtp.layers.{i}.mlp" for i in range(2)]
    shapes = block_of() | block_of(module=both[0]) | block_of(module=both[1])
    removals = built(keeping(KEPT, KEPT, names=[f"{LAYER}.experts", f"{both[1]}.experts"]), shapes)
    with pytest.raises(ReapError, match="mtp has experts that the plan does not speak of"):
        mtp_layers(CONFIG, shapes, find_blocks(shapes), removals)


def test_two_stacks_under_one_count_are_pruned_alike_or_not_at_all() -> None:
    """Layers of one number in two stacks: the last one must not silently decide for both."""
    other = "encoder.layers.1.mlp"
    shapes = block_of() | block_of(module=other)
    names = [f"{LAYER}.experts", f"{other}.experts"]
    alike = built(keeping((0, 1), (1, 2), names=names), shapes)
    assert kept_by_place(alike) == {Place((), "num_experts", None): {1: 2}}
    unlike = built(keeping((0, 1), (0, 1, 2), names=names), shapes)
    with pytest.raises(ReapError, match="would keep 3 experts and another block of layer 1 2"):
        kept_by_place(unlike)
