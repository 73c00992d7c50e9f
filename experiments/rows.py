"""Rows of tokens: every row a piece of another document, from a place that the seed decides."""

from __future__ import annotations

import functools
from itertools import count as from_zero
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.texts import DOMAINS, texts
from reap.errors import ReapError
from reap.text.batching import Batch

CHARACTERS = 8  # at most, of a token of these texts on average


def training(tokenizer: Any, domain: str, seed: int, tokens: int, seq_len: int) -> Tensor:
    """[N,seq_len] of the training part; another seed is another sample, more tokens begin alike."""
    return _rows(tokenizer, domain, False, seed, tokens // seq_len, seq_len)


def calibration(tokenizer: Any, domain: str, seed: int, tokens: int, seq_len: int) -> list[Batch]:
    rows = training(tokenizer, domain, seed, tokens, seq_len)
    return [_batch(part, domain) for part in rows.split(16)]


def held_out(tokenizer: Any, tokens: int, seq_len: int, parts: int = 1) -> list[Batch]:
    """A batch per domain, or `parts` of them called "library/0", "library/1" and so on."""
    found = []
    for domain in DOMAINS:
        rows = _rows(tokenizer, domain, True, 0, tokens // seq_len, seq_len)
        names = [domain] if parts == 1 else [f"{domain}/{part}" for part in range(parts)]
        found += [_batch(*pair) for pair in zip(rows.chunk(parts), names, strict=True)]
    return found


def prompts(tokenizer: Any, seed: int, number: int, length: int) -> Tensor:
    """`number` held-out rows of every domain, one domain after the other. [D*number,length]"""
    return torch.cat([_rows(tokenizer, d, True, seed + 1, number, length) for d in DOMAINS])


def _batch(rows: Tensor, domain: str) -> Batch:
    return Batch(rows, torch.ones_like(rows), domain)


@functools.lru_cache(maxsize=256)
def _documents(domain: str, held_out: bool, seed: int) -> _Read:
    return _Read(domain, held_out, seed)


class _Read:
    """The documents of a domain, read when they are asked for, and once."""

    def __init__(self, domain: str, held_out: bool, seed: int) -> None:
        self._rest = texts(domain, held_out=held_out, seed=seed)
        self._texts: list[str] = []
        self._ended = False

    def __getitem__(self, number: int) -> str:
        while not self._ended and number >= len(self._texts):
            text = next(self._rest, None)
            self._ended = text is None
            self._texts += [] if text is None else [text]
        if not self._texts:
            raise ReapError("this Python's standard library has too little text for this")
        return self._texts[number % len(self._texts)]


def _rows(
    tokenizer: Any, domain: str, held_out: bool, seed: int, number: int, length: int
) -> Tensor:
    """[number, length] int64. Documents that are shorter share a row."""
    documents = _documents(domain, held_out, seed if not held_out else 0)
    rng = np.random.default_rng([seed, held_out, DOMAINS.index(domain)])
    rows: list[list[int]] = []
    row: list[int] = []
    for document in from_zero():
        if len(rows) == number:
            break
        text = documents[document]
        start = int(rng.integers(max(1, len(text) - CHARACTERS * length)))
        start = text.rfind("\n", 0, start) + 1
        piece = text[start : start + CHARACTERS * length]
        row += [*tokenizer(piece, verbose=False)["input_ids"], tokenizer.eos_token_id]
        if len(row) >= length:
            rows.append(row[:length])
            row = []
    return torch.tensor(rows, dtype=torch.int64)
