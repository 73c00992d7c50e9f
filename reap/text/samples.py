"""One row of a data set to text: which columns are read, and how a conversation is rendered.

A row is used as its columns say, or refused, or counted in the source's `Tally`.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from reap.errors import ReapError, first_line
from reap.files.units import counted
from reap.text.turns import apply, calls_in, listed, rendered, turn, unshown

CONVERSATIONS = ("messages", "conversations", "conversation")
# A question, what may go with it, and its answer, as the common data sets call them.
PAIRS = (
    ("prompt", "", "completion"),
    ("prompt", "", "response"),
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("question", "context", "answer"),
    ("question", "context", "response"),
    ("query", "", "answers"),
    ("query", "", "answer"),
    ("query", "", "response"),
    ("input", "", "output"),
)
SYSTEM = ("system", "system_prompt")
_NAMED = 3  # rows that a tally names


class Text(NamedTuple):
    """A piece of a document. `where` names it in errors, `ends` marks the document's last piece,
    `templated` text already carries its special tokens. `share`, of its file and then of its
    source, is what has been read when this piece has: up to 1, NaN where it cannot be told.
    `tokens`: its token ids, and which of them are the assistant's, where that was asked for."""

    text: str
    where: str
    ends: bool = True
    templated: bool = False
    share: float = math.nan
    tokens: tuple[list[int], list[bool]] | None = None


@dataclass
class Tally:
    """What became of a source's rows and files. `seen` may be shared between sources. `assistant`
    asks for the tokens of conversations."""

    skip_bad: bool = False
    seen: set[bytes] = field(default_factory=set)
    assistant: bool = False
    empty: int = 0  # rows whose text is "" or has no tokens, and empty files
    cut: int = 0  # rows of which the beginning was used, as asked for
    bad: int = 0  # left out by skip_bad
    repeated: int = 0  # used, although the same text came before
    unused: Counter[str] = field(default_factory=Counter)  # what the chat template does not show
    uncounted: int = 0  # ran, and none of their tokens counts
    named: list[str] = field(default_factory=list)  # the errors of the first bad rows

    def refuse(self, error: ReapError) -> None:
        """Raise `error`, or with skip_bad count it."""
        if not self.skip_bad:
            raise error
        self.bad += 1
        if self.bad <= _NAMED:
            self.named.append(str(error))

    def watch(self, texts: Iterable[Text]) -> Iterator[Text]:
        """The same texts; documents that were seen before are counted."""
        digest = hashlib.blake2b(digest_size=12)
        for piece in texts:
            digest.update(piece.text.encode())
            if piece.ends:
                self.repeated += digest.digest() in self.seen
                self.seen.add(digest.digest())
                digest = hashlib.blake2b(digest_size=12)
            yield piece

    def counts(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "empty": self.empty,
            "cut": self.cut,
            "bad": self.bad,
            "repeated": self.repeated,
            "unused": dict(self.unused),
            "uncounted": self.uncounted,
        }

    def lines(self) -> list[str]:
        """What a summary has to say; nothing when every row was used once."""
        said = []
        if self.bad:
            more = ", ..." if self.bad > len(self.named) else ""
            said.append(f"{_rows(self.bad)} left out as bad ({'; '.join(self.named)}{more})")
        if self.empty:
            said.append(f"{_rows(self.empty)} left out as empty")
        if self.cut:
            said.append(f"{_rows(self.cut)} cut to the row's length")
        if self.repeated:
            said.append(f"{_rows(self.repeated)} used that came before: they count again")
        for name, count in sorted(self.unused.items()):
            said.append(
                f"{_rows(count)} used without {name}, which the chat template does not show"
            )
        if self.uncounted:
            said.append(f"{_rows(self.uncounted)} ran without a token that counts")
        return said


def _rows(count: int) -> str:
    return counted(count, "row")


def sample_text(
    sample: Any, where: str, tokenizer: Any, column: str = "", tally: Tally | None = None
) -> Text | None:
    """The text of one row; None for a row that is empty, which the tally counts. With a `column`
    that one is read, text or a conversation. Without, in this order, the first that is there and
    not empty: "text", a conversation, a pair of `PAIRS`. ReapError says what is wrong with the row.
    """
    tally = Tally() if tally is None else tally
    fields = sample if isinstance(sample, dict) else {}
    found = _text(fields, where, tokenizer, column, tally)
    if not found.text:
        tally.empty += 1
        return None
    try:
        found.text.encode()
    except UnicodeEncodeError:
        raise ReapError(f"{where}: holds half of a surrogate pair, it is not text") from None
    return found


def _text(fields: dict[str, Any], where: str, tokenizer: Any, column: str, tally: Tally) -> Text:
    if column and column not in fields:
        raise ReapError(f"{where}: has no column {column!r}{_what_it_has(fields)}")
    plain = fields.get(column or "text")
    if isinstance(plain, str) and plain:
        return Text(plain, where)
    for name in (column,) if column else CONVERSATIONS:
        turns = listed(fields.get(name))
        if turns:
            return _render(turns, fields, where, tokenizer, tally)
    if plain == "" and column:
        return Text("", where)
    if not column:
        for question, context, answer in PAIRS:
            if {question, answer} <= fields.keys():
                turns = [*listed(fields[question]), *listed(fields[answer])]
                if all(isinstance(fields[name], list) for name in (question, answer)) and turns:
                    return _render(turns, fields, where, tokenizer, tally)
                pair = (fields[question], fields.get(context) or "", fields[answer])
                if all(isinstance(value, str) for value in pair):
                    return _pair_text(pair, question == "prompt", fields, where, tokenizer, tally)
                break
        if plain == "":
            return Text("", where)
    raise ReapError(
        f'{where}: needs "{column or "text"}", a string, or "messages", a list of '
        f'{{"role", "content"}}, or a pair such as "question" and "answer"{_what_it_has(fields)}'
    )


def _what_it_has(fields: dict[str, Any]) -> str:
    names = ", ".join(sorted(map(str, fields)))
    return f": it has {names[:80]}; FILE:COLUMN names the column to read" if names else ""


def _pair_text(
    pair: tuple[str, str, str],
    joined: bool,
    fields: dict[str, Any],
    where: str,
    tokenizer: Any,
    tally: Tally,
) -> Text:
    """A user's and an assistant's turn; without a chat template one after the other, a completion
    right behind its prompt."""
    question, context, answer = pair
    asked = "\n\n".join(filter(None, (question, context)))
    if not asked and not answer:
        return Text("", where)
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        tally.unused.update(name for name in ("tools", "history") if listed(fields.get(name)))
        system = next((fields[name] for name in SYSTEM if isinstance(fields.get(name), str)), "")
        answered = asked + answer if joined else "\n\n".join(filter(None, (asked, answer)))
        return Text("\n\n".join(filter(None, (system, answered))), where)
    turns = _history(fields, tally)
    turns += [{"role": "user", "content": asked}] if asked else []
    calls = calls_in(answer) if "tool_calls" in str(template) else []
    if calls:
        turns.append({"role": "assistant", "content": "", "tool_calls": calls})
    elif answer:
        turns.append({"role": "assistant", "content": answer})
    return _render(turns, fields, where, tokenizer, tally)


def _history(fields: dict[str, Any], tally: Tally) -> list[dict[str, Any]]:
    """The turns before a pair, which some sets have as pairs too."""
    pairs = listed(fields.get("history"))
    if any(not isinstance(p, list) or [type(text) for text in p] != [str, str] for p in pairs):
        tally.unused["history"] += 1
        return []
    roles = ("user", "assistant")
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(roles, pair, strict=True)
    ]


def _render(
    turns: list[Any], fields: dict[str, Any], where: str, tokenizer: Any, tally: Tally
) -> Text:
    """Turns through the chat template, with what else the row has for it."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise ReapError(f"{where}: has chat messages, but the tokenizer has no chat template")
    turns = [turn(one, where, str(template)) for one in turns]
    first = turns[0].get("role") if isinstance(turns[0], dict) else None
    system = next((fields[name] for name in SYSTEM if isinstance(fields.get(name), str)), "")
    if system and first != "system":
        turns = [{"role": "system", "content": system}, *turns]
    options = fields.get("chat_template_kwargs")
    options = dict(options) if isinstance(options, dict) else {}
    for name in ("tools", "documents"):
        given = fields.get(name)
        values = listed(given)
        if given and not values and given != "[]":
            raise ReapError(f'{where}: "{name}" is neither a list nor one written as JSON')
        if values and name in str(template):
            options[name] = [_tool(tool) for tool in values] if name == "tools" else values
        elif values:
            tally.unused[name] += 1
    try:
        text, turns = rendered(tokenizer, turns, options)
        tokens = _turns_of(tokenizer, turns, options) if tally.assistant else None
    except Exception as error:  # the template is the model author's program: anything goes
        reason = first_line(error)
        raise ReapError(f"{where}: the chat template refuses its messages ({reason})") from error
    if not text:
        raise ReapError(f"{where}: the chat template makes no text of its messages")
    tally.unused.update(unshown(turns, str(template)))
    return Text(text, where, templated=True, tokens=tokens)


def _tool(tool: Any) -> Any:
    bare = isinstance(tool, dict) and "name" in tool and "function" not in tool
    return {"type": "function", "function": tool} if bare else tool


def _turns_of(
    tokenizer: Any, turns: list[Any], options: dict[str, Any]
) -> tuple[list[int], list[bool]]:
    """The token ids of a conversation, and which of them the template says the assistant made."""
    how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    encoding = apply(tokenizer, turns, options | how)
    return list(encoding["input_ids"]), [bool(mark) for mark in encoding["assistant_masks"]]
