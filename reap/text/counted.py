"""Which tokens of a document count: all, those that follow a marker, or the assistant's.

All of them run, since they are what the others attend to. A token counts or it does not: the
statistics are counts of tokens and exact sums over them, in which a fractional weight has no
meaning (of how many tokens is 0.3 of one?), and a whole one is what weights of sources are for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from reap.errors import ReapError
from reap.text.samples import Text

ALL, ASSISTANT = "all", "assistant"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # what marks the assistant's turns


@dataclass(frozen=True)
class Counting:
    """`count` is "all" or "assistant"; `after` is a marker, or empty."""

    count: str = ALL
    after: str = ""

    @classmethod
    def of(cls, count: str, after: str | None, tokenizer: Any) -> Counting:
        """ReapError for what does not go together, or not with this tokenizer."""
        name = type(tokenizer).__name__
        if count not in (ALL, ASSISTANT):
            raise ReapError(f"count is {count!r}: it must be {ALL} or {ASSISTANT}")
        if after is not None and (not isinstance(after, str) or not after):
            raise ReapError(f"count_after is {after!r}: it must be text that the samples hold")
        if count == ASSISTANT and after:
            raise ReapError(f"count {ASSISTANT} and count_after {after!r}: choose one of them")
        template = str(getattr(tokenizer, "chat_template", None) or "")
        if count == ASSISTANT and not _GENERATION.search(template):
            has = "has no chat template" if not template else "has a chat template without"
            what = "" if not template else " {% generation %}, which marks the assistant's turns"
            raise ReapError(
                f"count {ASSISTANT}: {name} {has}{what}: give count_after the text that their "
                "answers begin with"
            )
        if count == ASSISTANT and not _has_offsets(tokenizer):
            raise ReapError(
                f"count {ASSISTANT}: {name} does not say which text a token is from: give "
                "count_after a token of its own"
            )
        if after and not _has_offsets(tokenizer) and after not in _added(tokenizer):
            raise ReapError(
                f"count_after {after!r}: {name} does not say which text a token is from, so the "
                "marker has to be a token of its own, which this is not"
            )
        return cls(count, after or "")

    @property
    def restricted(self) -> bool:
        return self.count != ALL or bool(self.after)

    def describe(self) -> Any:
        """As JSON: None, "assistant" or {"after": marker}."""
        return {"after": self.after} if self.after else self.count if self.restricted else None


def said(described: Any) -> str:
    """What `Counting.describe` gave, in words."""
    if isinstance(described, dict):
        return f"those after {described.get('after')!r}"
    return "the assistant's" if described == ASSISTANT else "all"


@dataclass
class Counter:
    """Encodes documents, piece by piece, and says which of their tokens count."""

    counting: Counting
    tokenizer: Any
    _found: bool = False  # the marker, in this document
    _tail: str = field(default="", repr=False)  # of the text before, which a marker may begin in

    def encode(self, piece: Text, special: bool) -> tuple[list[int], list[bool] | None]:
        """Token ids, and which of them count; None for all. `special`: with the tokens that the
        tokenizer puts around a document."""
        if piece.tokens is not None:
            return list(piece.tokens[0]), list(piece.tokens[1])
        if self.counting.count == ASSISTANT:
            return (ids := self._ids(piece.text, special)), [False] * len(ids)
        if not self.counting.after:
            return self._ids(piece.text, special), None
        return self._after(piece.text, special)

    def end(self) -> None:
        """The next piece is of another document."""
        self._found, self._tail = False, ""

    def _ids(self, text: str, special: bool) -> list[int]:
        encoding = self.tokenizer(text, add_special_tokens=special, verbose=False)
        return list(encoding["input_ids"])

    def _after(self, text: str, special: bool) -> tuple[list[int], list[bool]]:
        """A token counts whose text begins behind the marker's first end, and all that follow."""
        marker, begun = self.counting.after, len(self._tail)
        if self._found:
            ids = self._ids(text, special)
            return ids, [True] * len(ids)
        joined = self._tail + text
        at = joined.find(marker)
        self._found = at >= 0
        self._tail = joined[max(0, len(joined) - len(marker) + 1) :]
        if not _has_offsets(self.tokenizer):
            ids, token = self._ids(text, special), _added(self.tokenizer)[marker]
            first = ids.index(token) + 1 if token in ids else len(ids)
            self._found = token in ids
        else:
            encoding = self.tokenizer(
                text, add_special_tokens=special, return_offsets_mapping=True, verbose=False
            )
            ids, end = list(encoding["input_ids"]), at + len(marker) - begun
            first = len(ids)
            if self._found:
                spans = enumerate(encoding["offset_mapping"])
                behind = (i for i, (start, stop) in spans if stop > start >= end)
                first = next(behind, len(ids))
        return ids, [i >= first for i in range(len(ids))]


def _has_offsets(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "is_fast", False))


def _added(tokenizer: Any) -> dict[str, int]:
    """Tokens that no other text is a part of."""
    return dict(tokenizer.get_added_vocab()) if hasattr(tokenizer, "get_added_vocab") else {}
