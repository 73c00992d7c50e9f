"""Which tokens of a document count: all, those behind or between markers, or the assistant's.

All of them run, since they are what the others attend to. A token counts or it does not: the
statistics are counts of tokens and exact sums over them, in which a fractional weight has no
meaning (of how many tokens is 0.3 of one?), and a whole one is what weights of sources are for.
"""

from __future__ import annotations

import math
import re
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from reap.errors import ReapError
from reap.text.samples import Text

ALL, ASSISTANT = "all", "assistant"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # what marks the assistant's turns


@dataclass(frozen=True)
class Counting:
    """`count` is "all" or "assistant"; `after` and `until` are markers, or empty."""

    count: str = ALL
    after: str = ""
    until: str = ""

    @classmethod
    def of(cls, count: str, after: str | None, until: str | None, tokenizer: Any) -> Counting:
        """ReapError for what does not go together, or not with this tokenizer."""
        if count not in (ALL, ASSISTANT):
            raise ReapError(f"count is {count!r}: it must be {ALL} or {ASSISTANT}")
        markers = {"count_after": after, "count_until": until}
        for what, marker in markers.items():
            if marker is not None and (not isinstance(marker, str) or not marker):
                raise ReapError(f"{what} is {marker!r}: it must be text that the samples hold")
        if count == ASSISTANT and (after or until):
            raise ReapError(f"count {ASSISTANT} and a marker, {after or until!r}: choose one")
        if until and not after:
            raise ReapError(f"count_until {until!r} needs count_after, with which a span begins")
        if count == ASSISTANT:
            _check_template(tokenizer)
        for what, marker in markers.items():
            if marker and not _has_offsets(tokenizer) and marker not in _added(tokenizer):
                raise ReapError(
                    f"{what} {marker!r}: {type(tokenizer).__name__} does not say which text a "
                    "token is from, so the marker has to be a token of its own, which this is not"
                )
        return cls(count, after or "", until or "")

    @property
    def restricted(self) -> bool:
        return self.count != ALL or bool(self.after)

    def describe(self) -> Any:
        """As JSON: None, "assistant" or {"after": marker}, perhaps with "until"."""
        if self.after:
            return {"after": self.after} | ({"until": self.until} if self.until else {})
        return self.count if self.restricted else None


def said(described: Any) -> str:
    """What `Counting.describe` gave, in words."""
    if isinstance(described, dict):
        until = f" until {described['until']!r}" if "until" in described else ""
        return f"those after {described.get('after')!r}{until}"
    return "the assistant's" if described == ASSISTANT else "all"


def _check_template(tokenizer: Any) -> None:
    """ReapError where the assistant's turns cannot be told."""
    name = type(tokenizer).__name__
    template = str(getattr(tokenizer, "chat_template", None) or "")
    reason = None
    if not template:
        reason = f"{name} has no chat template"
    elif not _GENERATION.search(template):
        reason = (
            f"the chat template of {name} does not mark the assistant's turns by {{% generation %}}"
        )
    elif not _has_offsets(tokenizer):
        reason = f"{name} does not say which text a token is from"
    if reason is not None:
        raise ReapError(
            f"count {ASSISTANT}: {reason}: give count_after and count_until the texts between "
            "which an answer stands"
        )


@dataclass
class Counter:
    """Encodes documents, piece by piece, and says which of their tokens count."""

    counting: Counting
    tokenizer: Any
    _on: bool = False  # between the markers, where the last piece ended
    _tail: str = field(default="", repr=False)  # of the text before, which a marker may begin in

    def encode(self, piece: Text, special: bool) -> tuple[list[int], list[bool] | None]:
        """Token ids, and which of them count; None for all. `special`: with the tokens that the
        tokenizer puts around a document."""
        if piece.tokens is not None:
            return list(piece.tokens[0]), list(piece.tokens[1])
        spans = bool(self.counting.after) and _has_offsets(self.tokenizer)
        options = {"return_offsets_mapping": True} if spans else {}
        encoding = self.tokenizer(piece.text, add_special_tokens=special, verbose=False, **options)
        ids = list(encoding["input_ids"])
        if not self.counting.restricted:
            return ids, None
        if spans:
            return ids, self._by_text(piece.text, encoding["offset_mapping"])
        if self.counting.after:
            return ids, self._by_tokens(ids)
        return ids, [False] * len(ids)  # no turn of a conversation

    def end(self) -> None:
        """The next piece is of another document."""
        self._on, self._tail = False, ""

    def _by_text(self, text: str, offsets: list[tuple[int, int]]) -> list[bool]:
        """A token counts whose text begins between the markers; one of no text goes with the one
        before it."""
        counts, marks = self._on, []
        spans = deque(self._spans(text))
        for start, stop in offsets:
            if stop > start:
                while spans and spans[0][1] <= start:
                    spans.popleft()
                counts = bool(spans) and spans[0][0] <= start
            marks.append(counts)
        return marks

    def _spans(self, text: str) -> list[tuple[float, float]]:
        """Where the text counts: from behind the first marker to behind the second."""
        joined, begun = self._tail + text, len(self._tail)
        spans: list[tuple[float, float]] = []
        place, start = 0, 0
        while sought := self.counting.until if self._on else self.counting.after:
            at = joined.find(sought, place)
            if at < 0:
                break
            place = at + len(sought)
            if self._on:
                spans.append((start - begun, place - begun))
            self._on, start = not self._on, place
        if self._on:
            spans.append((start - begun, math.inf))
        kept = max(place, len(joined) - len(sought) + 1) if sought else len(joined)
        self._tail = joined[kept:]
        return spans

    def _by_tokens(self, ids: list[int]) -> list[bool]:
        added = _added(self.tokenizer)
        begin, end = added[self.counting.after], added.get(self.counting.until)
        marks = []
        for token in ids:
            marks.append(self._on)
            self._on = token != end if self._on else token == begin
        return marks


def _has_offsets(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "is_fast", False))


def _added(tokenizer: Any) -> dict[str, int]:
    """Tokens that no other text is a part of."""
    return dict(tokenizer.get_added_vocab()) if hasattr(tokenizer, "get_added_vocab") else {}
