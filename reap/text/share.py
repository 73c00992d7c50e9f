"""Which of all batches one process runs, where several are to do the work of one.

All of them read all of the text and number its batches alike, without a word between them. Of every
round of n batches each takes one, the next round begins with another: sources that take turns are
spread over all. Every batch is one's, so that the sums of all are those of one process.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from reap.errors import ReapError


@dataclass(frozen=True)
class Share:
    """The batches of process `number`, which counts from 0, of `of`."""

    number: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            raise ReapError(
                f"there is no shard {self.number}/{self.of}: of n shards the first is 0/n, the "
                "last n-1/n"
            )

    @classmethod
    def parse(cls, text: str) -> Share:
        """ "3/8" as one. ReapError for anything else."""
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
        if found is None:
            raise ReapError(f"shard is {text!r}: give it as number/of, from 0/8 to 7/8 say")
        return cls(int(found[1]), int(found[2]))

    def has(self, batch: int) -> bool:
        """Whether batch number `batch` of all is of this share."""
        turn, place = divmod(batch, self.of)
        return (turn + place) % self.of == self.number

    def describe(self) -> dict[str, Any]:
        """As JSON, of the form of several shards that were added; {} for all batches."""
        return {} if self.of == 1 else {"shard": {"numbers": [self.number], "of": self.of}}
