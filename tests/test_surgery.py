"""Which bytes go where, on hand-made checkpoints: names, axes, quantised formats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from folders import EXPERTS, KEPT, plan_for

from reap.checkpoint.operation import layout_of, operate
from reap.checkpoint.writing import write_shards
from reap.errors import ReapError
from reap.files.folder import open_folder
from reap.files.safefile import BITS, encode_header, read_header, span
from reap.planning.plan import Plan

Spec = Mapping[str, tuple[str, tuple[int, ...]]]


def checkpoint(folder: Path, tensors: Spec, **config: object) -> dict[str, np.ndarray]:
    """A folder with these tensors, filled with random bytes; returns the bytes of each."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"num_experts": EXPERTS}))
    rng = np.random.default_rng(0)
    raw = {
        name: rng.integers(0, 256, span(*spec), dtype=np.uint8) for name, spec in tensors.items()
    }
    data = b"".join(raw[name].tobytes() for name in tensors)
    (folder / "model.safetensors").write_bytes(
        encode_header(dict(tensors), {"format": "pt"}) + data
    )
    return raw


def pruned(
    folder: Path, plan: Plan
) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, ...]], dict]:
    """The bytes and shapes after pruning, and the new config."""
    source = open_folder(folder)
    operation = operate(source, plan)
    out = folder / "written"
    out.mkdir()
    write_shards(source, layout_of(source, operation), out, lambda n: None)
    header = read_header(out / "model.safetensors")
    data = (out / "model.safetensors").read_bytes()[header.data :]
    raw = {n: np.frombuffer(data[t.start : t.stop], np.uint8) for n, t in header.tensors.items()}
    widths = [BITS[t.dtype] for t in header.tensors.values()]
    assert widths == sorted(widths, reverse=True), "wide elements come first, so all are aligned"
    return raw, {n: t.shape for n, t in header.tensors.items()}, operation.config


def rows(raw: np.ndarray, length: int, kept: tuple[int, ...]) -> np.ndarray:
    return raw.reshape(length, -1)[list(kept)].reshape(-1)


def test_per_expert_fp8_and_int4(tmp_path: Path) -> None:
    """Scales, zero points and packed weights are tensors of an expert like any other."""
    block = "model.layers.3.mlp"
    parts: dict[str, tuple[str, tuple[int, ...]]] = {
        "up_proj.weight": ("F8_E4M3", (8, 16)), "up_proj.weight_scale_inv": ("F32", (1, 1)),
        "down_proj.weight_packed": ("I32", (16, 2)), "down_proj.weight_scale": ("BF16", (16, 1)),
        "down_proj.weight_shape": ("I64", (2,)), "gate_proj.input_scale": ("F32", ()),
    }  # fmt: skip
    tensors = {
        f"{block}.experts.{i}.{n}": spec for i in range(EXPERTS) for n, spec in parts.items()
    }
    tensors[f"{block}.gate.weight"] = ("BF16", (EXPERTS, 16))
    tensors[f"{block}.gate.e_score_correction_bias"] = ("F32", (EXPERTS,))
    tensors[f"{block}.shared_experts.up_proj.weight"] = ("F8_E4M3", (EXPERTS, 16))
    before = checkpoint(tmp_path / "m", tensors, n_routed_experts=EXPERTS)
    after, shapes, config = pruned(tmp_path / "m", plan_for(f"{block}.experts"))
    assert config == {"n_routed_experts": 3}
    for new, old in enumerate(KEPT):
        for part in parts:
            assert np.array_equal(
                after[f"{block}.experts.{new}.{part}"], before[f"{block}.experts.{old}.{part}"]
            )
    assert not any(f".experts.{i}." in name for i in range(3, EXPERTS) for name in after)
    for name in ("gate.weight", "gate.e_score_correction_bias"):
        assert np.array_equal(
            after[f"{block}.{name}"], rows(before[f"{block}.{name}"], EXPERTS, KEPT)
        )
        assert shapes[f"{block}.{name}"][0] == 3
    shared = f"{block}.shared_experts.up_proj.weight"
    assert np.array_equal(after[shared], before[shared])


def test_fused_mxfp4(tmp_path: Path) -> None:
    block = "model.layers.0.mlp"
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{block}.experts.gate_up_proj_blocks": ("U8", (EXPERTS, 8, 2, 16)),
        f"{block}.experts.gate_up_proj_scales": ("U8", (EXPERTS, 8, 2)),
        f"{block}.experts.gate_up_proj_bias": ("BF16", (EXPERTS, 8)),
        f"{block}.experts.down_proj": ("F4", (EXPERTS, 3, 2)),
        f"{block}.experts.down_proj_input_scale": ("F32", (1,)),
        f"{block}.router.weight": ("BF16", (EXPERTS, 4)),
        f"{block}.router.bias": ("BF16", (EXPERTS,)),
    }  # fmt: skip
    before = checkpoint(tmp_path / "m", tensors, num_local_experts=EXPERTS)
    after, shapes, _ = pruned(tmp_path / "m", plan_for(f"{block}.experts"))
    for name in tensors:
        if name.endswith("input_scale"):
            assert np.array_equal(after[name], before[name])
        else:
            assert shapes[name] == (3, *tensors[name][1][1:])
            assert np.array_equal(after[name], rows(before[name], EXPERTS, KEPT))


def test_experts_one_after_another_along_the_rows(tmp_path: Path) -> None:
    """DBRX: [E * I, H] instead of [E, I, H]."""
    block = "transformer.blocks.0.ffn"
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{block}.experts.mlp.{part}": ("BF16", (EXPERTS * 3, 4)) for part in ("w1", "v1", "w2")
    }
    tensors[f"{block}.router.layer.weight"] = ("BF16", (EXPERTS, 4))
    before = checkpoint(tmp_path / "m", tensors, ffn_config={"moe_num_experts": EXPERTS})
    after, shapes, config = pruned(tmp_path / "m", plan_for(f"{block}.experts"))
    assert config == {"ffn_config": {"moe_num_experts": 3}}
    assert shapes[f"{block}.experts.mlp.w2"] == (9, 4)
    for name in tensors:
        assert np.array_equal(after[name], rows(before[name], EXPERTS, KEPT))


def with_router(**parts: tuple[str, tuple[int, ...]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A layer of experts with a router of these tensors."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        f"layers.0.mlp.experts.{i}.up_proj.weight": ("BF16", (4, 4)) for i in range(EXPERTS)
    }
    return tensors | {f"layers.0.mlp.gate.{name}": part for name, part in parts.items()}


@pytest.mark.parametrize(
    ("parts", "rowed"),
    [
        # FP8: a scale per row; one for a block of rows that has them all; one for everything.
        ({"weight": ("F8_E4M3", (EXPERTS, 4)), "weight_scale": ("F32", (EXPERTS, 1))}, 2),
        ({"weight": ("F8_E4M3", (EXPERTS, 4)), "weight_scale_inv": ("F32", (1, 2))}, 1),
        ({"weight": ("F8_E4M3", (EXPERTS, 4)), "weight_scale": ("F32", ())}, 1),
        # NVFP4
        (
            {
                "weight_packed": ("U8", (EXPERTS, 4)),
                "weight_scale": ("F8_E4M3", (EXPERTS, 2)),
                "weight_global_scale": ("F32", (1,)),
                "input_global_scale": ("F32", (1,)),
            },
            2,
        ),
    ],
)
def test_quantised_routers(parts: dict, rowed: int, tmp_path: Path) -> None:
    tensors = with_router(**parts)
    before = checkpoint(tmp_path / "m", tensors)
    after, shapes, _ = pruned(tmp_path / "m", plan_for("layers.0.mlp.experts"))
    for i, name in enumerate(f"layers.0.mlp.gate.{part}" for part in parts):
        whole = i >= rowed
        expected = before[name] if whole else rows(before[name], EXPERTS, KEPT)
        assert np.array_equal(after[name], expected)
        assert shapes[name] == (tensors[name][1] if whole else (3, *tensors[name][1][1:]))


@pytest.mark.parametrize(
    ("parts", "odd"),
    [
        # FP8 with a scale for every few rows: no scale fits the rows that stay.
        (
            {"weight": ("F8_E4M3", (EXPERTS, 4)), "weight_scale_inv": ("F32", (2, 2))},
            "weight_scale_inv' with shape [2, 2]",
        ),
        (
            {"weight": ("F8_E4M3", (EXPERTS, 4)), "weight_scale": ("F32", (1, EXPERTS))},
            "weight_scale'",
        ),
        # GPTQ packs the zero points of several experts into one number.
        (
            {
                "qzeros": ("I32", (2, 1)),
                "qweight": ("I32", (2, EXPERTS)),
                "scales": ("F16", (2, EXPERTS)),
                "g_idx": ("I32", (16,)),
            },
            "qzeros'",
        ),
        # int4 of compressed-tensors writes down the shape.
        (
            {"weight_packed": ("I32", (EXPERTS, 1)), "weight_shape": ("I64", (2,))},
            "weight_shape'",
        ),
    ],
)
def test_quantised_routers_that_cannot_be_cut(parts: dict, odd: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "m", with_router(**parts))
    with pytest.raises(ReapError, match="is part of a quantised router") as caught:
        operate(open_folder(tmp_path / "m"), plan_for("layers.0.mlp.experts"))
    assert str(caught.value).startswith(f"'layers.0.mlp.gate.{odd}")


@pytest.mark.parametrize("fused", [True, False])
def test_another_tower_with_a_count_of_its_own_is_left_alone(tmp_path: Path, fused: bool) -> None:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for tower, experts in (("model.layers", EXPERTS), ("model.vision_tower.blocks", 4)):
        parts = [""] if fused else [f"{i}." for i in range(experts)]
        shape = (experts, 8, 2) if fused else (8, 2)
        tensors |= {f"{tower}.0.mlp.experts.{i}up_proj.weight": ("BF16", shape) for i in parts}
        tensors[f"{tower}.0.mlp.gate.weight"] = ("BF16", (experts, 2))
    config = {"text_config": {"num_experts": EXPERTS}, "vision_config": {"num_experts": 4}}
    before = checkpoint(tmp_path / "m", tensors, **config)
    after, _, new = pruned(tmp_path / "m", plan_for("model.layers.0.mlp.experts"))
    assert new == {"text_config": {"num_experts": 3}, "vision_config": {"num_experts": 4}}
    for name in before:
        if "vision" in name:
            assert np.array_equal(after[name], before[name])


def test_experts_that_share_a_byte_are_refused(tmp_path: Path) -> None:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "layers.0.mlp.experts.up_proj": ("F4", (EXPERTS, 3)),
        "layers.0.mlp.gate.weight": ("U8", (EXPERTS, 1)),
    }  # fmt: skip
    checkpoint(tmp_path / "m", tensors)
    with pytest.raises(ReapError, match="packs several experts into one byte"):
        operate(open_folder(tmp_path / "m"), plan_for("layers.0.mlp.experts"))


def test_text_and_vision_experts_in_one_numbering(tmp_path: Path) -> None:
    """ERNIE-VL: transposed routers, a [2, E] bias with other rows in each half, 2E experts."""
    block = "model.layers.1.mlp"
    names = [f"model.language_model.layers.1.mlp.{kind}_moe.experts" for kind in ("text", "vision")]
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{block}.experts.{i}.up_proj.weight": ("BF16", (2, 2)) for i in range(2 * EXPERTS)
    }
    tensors[f"{block}.gate.weight"] = ("F32", (5, EXPERTS))
    tensors[f"{block}.gate.weight_1"] = ("F32", (5, EXPERTS))
    tensors[f"{block}.moe_statics.e_score_correction_bias"] = ("F32", (2, EXPERTS))
    before = checkpoint(tmp_path / "m", tensors, moe_num_experts=[EXPERTS, EXPERTS])
    vision = (0, 3, 4)
    plan = plan_for(*names)
    plan = Plan(
        model=plan.model, criterion="random", seed=0, kept={names[0]: KEPT, names[1]: vision}
    )
    after, _, config = pruned(tmp_path / "m", plan)
    assert config == {"moe_num_experts": [3, 3]}
    for number, first in enumerate([*KEPT, *(EXPERTS + i for i in vision)]):
        now, was = (f"{block}.experts.{i}.up_proj.weight" for i in (number, first))
        assert np.array_equal(after[now], before[was])

    def columns(name: str, kept: tuple[int, ...]) -> np.ndarray:
        return before[f"{block}.{name}"].view(np.float32).reshape(-1, EXPERTS)[:, kept]

    gate = after[f"{block}.gate.weight"].view(np.uint32).reshape(5, 3)
    assert np.array_equal(gate, columns("gate.weight", KEPT).view(np.uint32))
    gate = after[f"{block}.gate.weight_1"].view(np.uint32).reshape(5, 3)
    assert np.array_equal(gate, columns("gate.weight_1", vision).view(np.uint32))
    old = before[f"{block}.moe_statics.e_score_correction_bias"].view(np.uint32).reshape(2, EXPERTS)
    new = after[f"{block}.moe_statics.e_score_correction_bias"].view(np.uint32).reshape(2, 3)
    assert np.array_equal(new, np.stack([old[0, list(KEPT)], old[1, list(vision)]]))


def test_a_router_in_a_module_beside_the_experts(tmp_path: Path) -> None:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "layers.0.mlp.experts.up_proj": ("BF16", (EXPERTS, 3)),
        "layers.0.moe.gate.weight": ("BF16", (EXPERTS, 4)),
    }
    before = checkpoint(tmp_path / "m", tensors)
    after, _, _ = pruned(tmp_path / "m", plan_for("layers.0.mlp.experts"))
    for name in tensors:
        assert np.array_equal(after[name], rows(before[name], EXPERTS, KEPT))


@pytest.mark.parametrize("longer", ["gate.weight", "experts.up_proj"])
@pytest.mark.parametrize("model_type", ["any", "zaya"])
def test_rows_after_those_of_the_experts(tmp_path: Path, longer: str, model_type: str) -> None:
    """They stay in the routers of some architectures; anywhere else they are not understood."""
    shapes = {f"layers.0.mlp.{tail}": (EXPERTS, 4) for tail in ("gate.weight", "experts.up_proj")}
    name = f"layers.0.mlp.{longer}"
    shapes[name] = (EXPERTS + 2, 4)
    before = checkpoint(tmp_path / "m", {n: ("BF16", shape) for n, shape in shapes.items()})
    plan = plan_for("layers.0.mlp.experts", model_type=model_type)
    if (longer, model_type) == ("gate.weight", "zaya"):
        after, _, _ = pruned(tmp_path / "m", plan)
        stay = (*KEPT, EXPERTS, EXPERTS + 1)
        assert np.array_equal(after[name], rows(before[name], EXPERTS + 2, stay))
    else:
        with pytest.raises(ReapError, match=f"{name}' has shape .* one entry for each of 6"):
            operate(open_folder(tmp_path / "m"), plan)


def test_strided_rows_wider_than_the_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reap.checkpoint.writing.GATHER", 40)
    block = "model.layers.1.mlp"
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{block}.experts.{i}.up_proj.weight": ("U8", (1,)) for i in range(EXPERTS)
    }
    tensors[f"{block}.gate.weight"] = ("U8", (EXPERTS, 1))
    tensors[f"{block}.moe_statics.e_score_correction_bias"] = ("U8", (7, EXPERTS, 2))
    before = checkpoint(tmp_path / "m", tensors)
    after, _, _ = pruned(tmp_path / "m", plan_for(f"{block}.experts"))
    name = f"{block}.moe_statics.e_score_correction_bias"
    assert np.array_equal(
        after[name].reshape(7, 3, 2), before[name].reshape(7, EXPERTS, 2)[:, KEPT]
    )
