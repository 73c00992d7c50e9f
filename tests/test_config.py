"""A model's configuration: its language model's part, and the length of its rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_config

from reap.errors import ReapError
from reap.model.config import row_length, text_config


def test_text_config() -> None:
    config = tiny_config("qwen3_vl_moe")
    assert text_config(config) is config.text_config
    assert text_config(tiny_config("mixtral")).model_type == "mixtral"


def test_rows_are_as_long_as_the_model_has_positions(tmp_path: Path) -> None:
    tiny_config("qwen3_moe").save_pretrained(tmp_path)
    assert row_length(tmp_path, None) == 64 and row_length(tmp_path, 9) == 9
    with pytest.raises(ReapError, match="rows of 65 tokens are too long: .* 64 positions"):
        row_length(tmp_path, 65)
