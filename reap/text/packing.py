"""Documents to rows of token ids: packed one behind the other, or one per row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from reap.text.counted import Counter, Counting
from reap.text.samples import Tally, Text


class Row(NamedTuple):
    """Token ids, the share of the source that has been read at their end (`Text.share`), and which
    of them count, None for all."""

    ids: list[int]
    share: float
    counted: list[bool] | None = None


class HeldRow(NamedTuple):
    """One that is held: in numpy, where a token takes 4 bytes."""

    ids: Any  # [n] int32
    counted: Any  # [n] bool, or None

    def encoded(self) -> bytes:
        """What is hashed of a row: its length, then its ids, int32 little endian, then, where not
        all count, per token whether it does."""
        marks = b"" if self.counted is None else self.counted.tobytes()
        return np.array([len(self.ids)], "<i4").tobytes() + self.ids.tobytes() + marks


@dataclass(frozen=True)
class Packer:
    """Documents to rows of token ids. Packing, as in the paper, joins the documents with the
    end-of-text token and cuts the stream every `seq_len`; its last row may be short and is padded,
    so no token is lost. Without packing a row is the beginning of one document."""

    tokenizer: Any
    seq_len: int
    packing: bool
    counting: Counting = field(default_factory=Counting)

    def rows(self, texts: Iterable[Text], tally: Tally | None = None) -> Iterator[Row]:
        """Rows of 1 to `seq_len` ids. The tally counts documents that were cut, or gave none, or
        none that counts."""
        tally = Tally() if tally is None else tally
        counter = Counter(self.counting, self.tokenizer)
        pending: list[int] = []
        marks: list[bool] = []  # of pending, where not all count
        counts = False  # a token of this document
        starts, share, length = True, 0.0, 0  # the last is of this document, as far as it is read
        for piece in texts:
            if self.packing or len(pending) <= self.seq_len:
                ids, its_marks = self._encode(counter, piece, starts)
                length += len(ids)
                pending += ids
                marks += its_marks or ()
                seen = its_marks if self.packing else marks[: self.seq_len]
                counts |= its_marks is None or True in (seen or ())
            starts = piece.ends
            if piece.ends:
                tally.empty += length == 0
                tally.cut += not self.packing and length > self.seq_len
                tally.uncounted += length > 0 and not counts
                length, counts = 0, False
                counter.end()
            if self.packing:
                whole = len(pending) - len(pending) % self.seq_len
                for end in range(self.seq_len, whole + 1, self.seq_len):
                    reached = share + (piece.share - share) * end / len(pending)
                    yield self._row(pending, marks, slice(end - self.seq_len, end), reached)
                pending, marks = pending[whole:], marks[whole:]
            elif piece.ends and pending:
                yield self._row(pending, marks, slice(self.seq_len), piece.share)
                pending, marks = [], []
            share = piece.share
        if pending:
            yield self._row(pending, marks, slice(self.seq_len), 1.0)

    def _row(self, ids: list[int], marks: list[bool], part: slice, share: float) -> Row:
        return Row(ids[part], share, marks[part] if self.counting.restricted else None)

    def _encode(
        self, counter: Counter, piece: Text, starts: bool
    ) -> tuple[list[int], list[bool] | None]:
        """Token ids of a piece, with the end-of-text token of packing, and which of them count."""
        ids, marks = counter.encode(piece, special=starts and not piece.templated)
        end = self.tokenizer.eos_token_id
        if self.packing and piece.ends and end is not None and ids[-1:] not in ([], [end]):
            ids.append(end)
            if marks is not None:
                marks.append(marks[-1])
        return ids, marks

    def pad(self, rows: list[HeldRow]) -> tuple[Tensor, Tensor, Tensor | None]:
        """(input_ids, attention_mask), both [B, L] int64, and which tokens count [B, L] bool, None
        for all. L is `seq_len` when packing, else the longest row's length."""
        length = self.seq_len if self.packing else max(len(row.ids) for row in rows)
        fill = self.tokenizer.pad_token_id
        if fill is None:  # any id will do: the mask keeps it from being seen or counted
            fill = self.tokenizer.eos_token_id or 0
        ids = torch.full((len(rows), length), fill, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        counted = torch.zeros_like(ids, dtype=torch.bool)
        for index, (row, marks) in enumerate(rows):
            ids[index, : len(row)] = torch.from_numpy(row.astype(np.int64))
            mask[index, : len(row)] = 1
            if marks is not None:
                counted[index, : len(row)] = torch.from_numpy(marks)
        return ids, mask, counted if self.counting.restricted else None
