"""A tokenizer that needs no files: a token is a letter."""

from __future__ import annotations

from typing import Any


class Tokenizer:
    eos_token_id = pad_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 64 for letter in text]}
