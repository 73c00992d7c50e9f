"""The turns of a conversation, as data sets have them and as chat templates want them.

A template prints nothing for a field that it does not look for, so that what it leaves out has to
be told by us.
"""

from __future__ import annotations

import json
import re
from typing import Any

from reap.errors import ReapError

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
REASONING = ("reasoning_content", "reasoning", "thinking")  # one thing, under three names


def listed(value: Any) -> list[Any]:
    """A list, also one that is written as a JSON string; else nothing."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    return value if isinstance(value, list) else []


def turn(given: Any, where: str, template: str) -> Any:
    """A turn with "role" and "content"; ShareGPT's have "from" and "value". What is no turn at all
    is the chat template's to refuse. ReapError for one whose text cannot be read."""
    if not isinstance(given, dict):
        return given
    # Tables have every field in every row, where templates ask which of them are there.
    fields = {name: value for name, value in given.items() if value is not None}
    if "from" in fields and "value" in fields:
        fields = _of_sharegpt(fields, where)
    if "role" not in fields or not {"content", "tool_calls", *REASONING} & fields.keys():
        names = ", ".join(map(str, fields)) or "nothing"
        raise ReapError(f'{where}: a turn has {names}, not "role", "content"')
    if "content" not in fields and "content" in given:
        calls = fields.get("tool_calls") and _knows(template, "tool_calls")
        fields["content"] = None if calls else ""  # else it would be printed as "None"
    content = fields.get("content")
    for part in content if isinstance(content, list) else ():
        if _text_of(part) is None:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ReapError(f"{where}: a turn has a part of type {kind!r}: only text is read")
    known = next((name for name in REASONING if _knows(template, name)), None)
    given_as = next((name for name in REASONING if fields.get(name)), None)
    if known and given_as and known not in fields:
        fields[known] = fields.pop(given_as)
    return fields


def _knows(template: str, name: str) -> bool:
    """Whether a chat template looks for a field."""
    return re.search(rf"""[.'"]{name}\b""", template) is not None


def _of_sharegpt(fields: dict[str, Any], where: str) -> dict[str, Any]:
    role = SHAREGPT_ROLES.get(fields["from"]) if isinstance(fields["from"], str) else None
    if role is None:
        known = ", ".join(SHAREGPT_ROLES)
        raise ReapError(f"{where}: a turn is from {fields['from']!r}, which is none of {known}")
    calls = calls_in(fields["value"]) if fields["from"] == "function_call" else []
    if calls:
        return {"role": role, "content": "", "tool_calls": calls}
    return {"role": role, "content": fields["value"]}


def calls_in(text: Any) -> list[dict[str, Any]]:
    """Tool calls that are written as JSON, {"name", "arguments"} or a list of such; else none."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return []
    found = found if isinstance(found, list) else [found]
    if not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in found):
        return []
    return [{"type": "function", "function": call} for call in found]


def _text_of(part: Any) -> str | None:
    """The text of a part of a turn; None for an image, say."""
    text = part.get("text") if isinstance(part, dict) else part
    return text if isinstance(text, str) else None


def unshown(turns: list[Any], template: str) -> set[str]:
    """The fields with text that a chat template does not print."""
    return {
        name
        for one in turns
        if isinstance(one, dict)
        for name in ("tool_calls", *REASONING)
        if one.get(name) and not _knows(template, name)
    }


def rendered(tokenizer: Any, turns: list[Any], options: dict[str, Any]) -> tuple[str, list[Any]]:
    """The text of a conversation, and the turns as the template can print them: one that knows no
    parts would print a list as Python does."""
    text = str(apply(tokenizer, turns, {**options, "tokenize": False}))
    parts = [one.get("content") for one in turns if isinstance(one, dict)]
    if not any(isinstance(content, list) and str(content) in text for content in parts):
        return text, turns
    joined = [_joined(one) for one in turns]
    return str(apply(tokenizer, joined, {**options, "tokenize": False})), joined


def _joined(one: Any) -> Any:
    if not isinstance(one, dict) or not isinstance(one.get("content"), list):
        return one
    return {**one, "content": "".join(_text_of(part) or "" for part in one["content"])}


def apply(tokenizer: Any, turns: list[Any], options: dict[str, Any]) -> Any:
    """Arguments of tool calls may be JSON in a string: most templates want the object, some the
    string."""
    parsed = [_with_parsed_arguments(one) for one in turns]
    try:
        return tokenizer.apply_chat_template(parsed, **options)
    except Exception:
        if parsed == turns:
            raise
        return tokenizer.apply_chat_template(turns, **options)


def _with_parsed_arguments(one: Any) -> Any:
    calls = one.get("tool_calls") if isinstance(one, dict) else None
    if not isinstance(calls, list):
        return one
    return {**one, "tool_calls": [_parsed_call(call) for call in calls]}


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
