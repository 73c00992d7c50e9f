"""What transformers' loader makes of shapes: of layers that are alike one is asked about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from folders import saved, tensors_of
from mtps import saved_with_mtp

from reap.model import shapes

NAMES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.int64": "I64"}


def stored(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...]]]]:
    found = tensors_of(folder)
    tensors = {name: (NAMES[str(x.dtype)], tuple(x.shape)) for name, x in found.items()}
    return json.loads((folder / "config.json").read_text()), tensors


def both(monkeypatch: Any, *given: Any) -> tuple[set[str], int, set[str], int]:
    """What is found, and of how many tensors, with the short way and without."""
    found: list[Any] = []
    load = shapes._loaded
    for short in (True, False):
        seen: list[int] = []

        def counted(model: Any, state: Any, seen: Any = seen) -> Any:
            seen.append(len(state))
            return load(model, state)

        with monkeypatch.context() as patch:
            patch.setattr(shapes, "_loaded", counted)
            if not short:
                patch.setattr(shapes, "_repeated", lambda *_: shapes._Repeated(frozenset()))
            found += [shapes.loading_problems(*given), sum(seen)]
    return tuple(found)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gemma4", "nemotron_h"])
def test_what_is_whole(tmp_path: Path, monkeypatch: Any, model_type: str) -> None:
    saved(tmp_path, model_type)
    short, few, plain, all_of_them = both(monkeypatch, *stored(tmp_path))
    assert short == plain
    assert few < all_of_them / 2 or model_type != "qwen3_moe"


def test_with_multi_token_prediction(tmp_path: Path, monkeypatch: Any) -> None:
    saved_with_mtp(tmp_path, "deepseek_v3")
    short, _, plain, _ = both(monkeypatch, *stored(tmp_path))
    assert short == plain == set()


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("change", ["missing", "shape", "odd", "expert", "all odd", "all missing"])
def test_what_is_wrong_in_any_layer(
    tmp_path: Path, monkeypatch: Any, layer: int, change: str
) -> None:
    saved(tmp_path)
    config, tensors = stored(tmp_path)
    for number in range(4) if "all" in change else [layer]:
        name = f"model.layers.{number}.mlp."
        if change.endswith("missing"):
            del tensors[f"{name}gate.weight"]
        elif change == "shape":
            tensors[f"{name}gate.weight"] = "F32", (7, 32)
        elif change.endswith("odd"):
            tensors[f"{name}odd"] = "F32", (7,)
        else:
            del tensors[f"{name}experts.5.up_proj.weight"]
    short, _, plain, _ = both(monkeypatch, config, tensors)
    assert short == plain and plain


def test_outside_of_layers(tmp_path: Path, monkeypatch: Any) -> None:
    saved(tmp_path)
    config, tensors = stored(tmp_path)
    del tensors["model.norm.weight"]
    short, _, plain, _ = both(monkeypatch, config, tensors)
    assert short == plain == {"model.norm.weight is missing"}
