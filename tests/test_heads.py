"""Which MTP layer a run observes, and what is said where it is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from folders import saved
from mtps import saved_with_mtp
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from reap.model.load import load_model
from reap.runs.heads import chosen_mtp, own_mtp


def test_nothing_is_said_where_there_is_none(tmp_path: Path, caplog: Any) -> None:
    saved(tmp_path)
    model = load_model(tmp_path)
    assert chosen_mtp(model, tmp_path, True) == chosen_mtp(model, tmp_path, False) == (None, [])
    assert own_mtp(model) is None and own_mtp(tiny_model("glm4_moe")) is None
    (tmp_path / "model.safetensors").rename(tmp_path / "gone")
    assert own_mtp(model) is None and not caplog.records


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("mtp.fc.weight", "mtp is not what Qwen3NextModel has layers of: projection.weight is"),
        ("mtp.layers.0.mlp.experts.3.up_proj.weight", "mlp.experts.gate_up_proj cannot be conv"),
    ],
)
def test_one_that_is_not_whole_is_left_out(
    missing: str, reason: str, tmp_path: Path, caplog: Any
) -> None:
    made = saved_with_mtp(tmp_path, "qwen3_next")
    model = load_model(tmp_path)
    (one, said), (none, not_said) = (
        chosen_mtp(model, tmp_path, wanted) for wanted in (True, False)
    )
    assert one is not None and said == [
        "multi-token prediction: mtp counted too, `reap prune` will keep it"
    ]
    left_out = "multi-token prediction is left out, `reap prune` will drop it: "
    assert none is None and not_said == [f"{left_out}--no-mtp"]
    tensors = load_file(made.folder / "model.safetensors")
    del tensors[missing]
    save_file(tensors, made.folder / "model.safetensors", {"format": "pt"})
    one, said = chosen_mtp(model, tmp_path, True)
    assert one is None and said[0].startswith(f"{left_out}mtp") and reason in said[0]
    assert own_mtp(model) is None
    assert "multi-token prediction is left out: mtp" in caplog.text and reason in caplog.text


def test_a_model_of_the_hub(caplog: Any) -> None:
    for model_type, says in (("qwen3_moe", False), ("glm4_moe", True)):
        model = tiny_model(model_type)
        model.config._name_or_path = "org/name"
        assert own_mtp(model) is None
        assert ("org/name is no folder here" in caplog.text) == says
