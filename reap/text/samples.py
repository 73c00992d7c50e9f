"""One row of a data set to text: which columns are read, and how a conversation is rendered.

A row is used as its columns say, or refused, or counted in the source's `Tally`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from reap.errors import ReapError, first_line

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
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
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
    tools_unused: int = 0  # used without their tools, which the chat template does not show
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
            "tools_unused": self.tools_unused,
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
        if self.tools_unused:
            said.append(f"{_rows(self.tools_unused)} used without tools, which have no place")
        if self.uncounted:
            said.append(f"{_rows(self.uncounted)} ran without a token that counts")
        return said


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"


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
        turns = _listed(fields.get(name))
        if turns:
            turns = [_turn(turn, where) for turn in turns]
            return _render(turns, fields, where, tokenizer, tally)
    if plain == "" and column:
        return Text("", where)
    if not column:
        for question, context, answer in PAIRS:
            if {question, answer} <= fields.keys():
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


def _listed(value: Any) -> list[Any]:
    """A list, also one that is written as a JSON string; else nothing."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    return value if isinstance(value, list) else []


def _turn(turn: Any, where: str) -> Any:
    """A turn with "role" and "content"; ShareGPT's have "from" and "value". What is no turn at all
    is the chat template's to refuse, but a template prints nothing for a name it does not find."""
    if not isinstance(turn, dict):
        return turn
    if "from" in turn and "value" in turn:
        role = SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            known = ", ".join(SHAREGPT_ROLES)
            raise ReapError(f"{where}: a turn is from {turn['from']!r}, which is none of {known}")
        calls = _calls(turn["value"]) if turn["from"] == "function_call" else []
        if calls:
            return {"role": role, "content": "", "tool_calls": calls}
        return {"role": role, "content": turn["value"]}
    if "role" not in turn or not {"content", "tool_calls"} & turn.keys():
        raise ReapError(
            f'{where}: a turn has {", ".join(map(str, turn)) or "nothing"}, not "role", "content"'
        )
    return turn


def _calls(text: Any) -> list[dict[str, Any]]:
    """Tool calls that are written as JSON, {"name", "arguments"} or a list of such; else none."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return []
    found = found if isinstance(found, list) else [found]
    if not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in found):
        return []
    return [{"type": "function", "function": call} for call in found]


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
        tally.tools_unused += bool(_listed(fields.get("tools")))
        system = next((fields[name] for name in SYSTEM if isinstance(fields.get(name), str)), "")
        answered = asked + answer if joined else "\n\n".join(filter(None, (asked, answer)))
        return Text("\n\n".join(filter(None, (system, answered))), where)
    turns: list[dict[str, Any]] = [{"role": "user", "content": asked}] if asked else []
    calls = _calls(answer) if "tool_calls" in str(template) else []
    if calls:
        turns.append({"role": "assistant", "content": "", "tool_calls": calls})
    elif answer:
        turns.append({"role": "assistant", "content": answer})
    return _render(turns, fields, where, tokenizer, tally)


def _render(
    turns: list[Any], fields: dict[str, Any], where: str, tokenizer: Any, tally: Tally
) -> Text:
    """Turns through the chat template, with what else the row has for it."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise ReapError(f"{where}: has chat messages, but the tokenizer has no chat template")
    first = turns[0].get("role") if isinstance(turns[0], dict) else None
    system = next((fields[name] for name in SYSTEM if isinstance(fields.get(name), str)), "")
    if system and first != "system":
        turns = [{"role": "system", "content": system}, *turns]
    options = fields.get("chat_template_kwargs")
    options = dict(options) if isinstance(options, dict) else {}
    for name in ("tools", "documents"):
        given = fields.get(name)
        listed = _listed(given)
        if given and not listed and given != "[]":
            raise ReapError(f'{where}: "{name}" is neither a list nor one written as JSON')
        if listed and name in str(template):
            options[name] = [_tool(tool) for tool in listed] if name == "tools" else listed
        elif listed and name == "tools":
            tally.tools_unused += 1
    try:
        text = str(_apply(tokenizer, turns, {**options, "tokenize": False}))
        tokens = _turns_of(tokenizer, turns, options) if tally.assistant else None
    except Exception as error:  # the template is the model author's program: anything goes
        reason = first_line(error)
        raise ReapError(f"{where}: the chat template refuses its messages ({reason})") from error
    if not text:
        raise ReapError(f"{where}: the chat template makes no text of its messages")
    return Text(text, where, templated=True, tokens=tokens)


def _tool(tool: Any) -> Any:
    bare = isinstance(tool, dict) and "name" in tool and "function" not in tool
    return {"type": "function", "function": tool} if bare else tool


def _turns_of(
    tokenizer: Any, turns: list[Any], options: dict[str, Any]
) -> tuple[list[int], list[bool]]:
    """The token ids of a conversation, and which of them the template says the assistant made."""
    how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    encoding = _apply(tokenizer, turns, options | how)
    return list(encoding["input_ids"]), [bool(mark) for mark in encoding["assistant_masks"]]


def _apply(tokenizer: Any, turns: list[Any], options: dict[str, Any]) -> Any:
    """Arguments of tool calls may be JSON in a string: most templates want the object, some the
    string."""
    parsed = [_with_parsed_arguments(turn) for turn in turns]
    try:
        return tokenizer.apply_chat_template(parsed, **options)
    except Exception:
        if parsed == turns:
            raise
        return tokenizer.apply_chat_template(turns, **options)


def _with_parsed_arguments(turn: Any) -> Any:
    calls = turn.get("tool_calls") if isinstance(turn, dict) else None
    if not isinstance(calls, list):
        return turn
    return {**turn, "tool_calls": [_parsed_call(call) for call in calls]}


def _parsed_call(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _parsed_call(call["function"])}
    try:
        arguments = json.loads(call["arguments"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return call
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call
