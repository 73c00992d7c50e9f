"""Rows of data sets: every common layout is used as its columns say, or refused, or counted."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_batching import make_tokenizer

from reap.errors import ReapError
from reap.text.samples import Tally, sample_text

CHAT = make_tokenizer(
    chat_template="{% if tools %}<{{ tools | map(attribute='function') | map(attribute='name') "
    "| join(',') }}>{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.name }}"
    "{% for k, v in c.function.arguments | items %} {{ k }}={{ v }}{% endfor %})"
    "{% endfor %}{% endfor %}"
)
NO_TOOLS = make_tokenizer(
    chat_template="{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)
PLAIN = make_tokenizer()
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
RENDERED = "[user]hi[assistant]yo"
TOOL = {"name": "f", "description": "d", "parameters": {}}
WRAPPED = {"type": "function", "function": TOOL}
CALL = {"name": "f", "arguments": {"a": 1}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]}
AS_STRING = {"function": {"name": "f", "arguments": '{"a": 1}'}}


def read(tokenizer: Any, column: str = "", **fields: Any) -> str:
    found = sample_text(fields, "here", tokenizer, column)
    return "" if found is None else found.text


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"text": "a"}, "a"),
        ({"text": "a", "messages": TURNS}, "a"),
        ({"text": "", "messages": TURNS}, RENDERED),
        ({"text": None, "messages": TURNS}, RENDERED),
        ({"messages": json.dumps(TURNS)}, RENDERED),
        ({"conversations": TURNS}, RENDERED),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
            RENDERED,
        ),
        ({"system": "s", "messages": TURNS}, "[system]s" + RENDERED),
        ({"prompt": "hi", "completion": "yo"}, RENDERED),
        ({"prompt": "hi", "response": "yo", "id": 7}, RENDERED),
        ({"prompt": "x", "messages": TURNS}, RENDERED),
        ({"instruction": "hi", "input": "", "output": "yo"}, RENDERED),
        ({"instruction": "hi", "input": "in", "output": "yo"}, "[user]hi\n\nin[assistant]yo"),
        ({"instruction": "hi", "context": "c", "response": "yo"}, "[user]hi\n\nc[assistant]yo"),
        ({"question": "hi", "answer": "yo"}, RENDERED),
        ({"system_prompt": "s", "question": "hi", "response": "yo"}, "[system]s" + RENDERED),
        ({"query": "hi", "answers": "yo"}, RENDERED),
        ({"instruction": "", "output": "yo"}, "[assistant]yo"),
        ({"messages": TURNS, "tools": [WRAPPED]}, "<f>" + RENDERED),
        ({"messages": TURNS, "tools": json.dumps([TOOL])}, "<f>" + RENDERED),
        ({"messages": TURNS, "tools": []}, RENDERED),
        ({"messages": TURNS, "tools": None}, RENDERED),
        ({"messages": [CALLED]}, "[assistant](f a=1)"),
        ({"messages": [CALLED | {"tool_calls": [AS_STRING]}]}, "[assistant](f a=1)"),
        (
            {"query": "hi", "answers": json.dumps([CALL]), "tools": json.dumps([TOOL])},
            "<f>[user]hi[assistant](f a=1)",
        ),
        (
            {"conversations": [{"from": "function_call", "value": json.dumps(CALL)}]},
            "[assistant](f a=1)",
        ),
    ],
)
def test_layouts(fields: dict[str, Any], text: str) -> None:
    assert read(CHAT, **fields) == text


def test_pairs_without_a_chat_template() -> None:
    assert read(PLAIN, prompt="1 +", completion=" 1") == "1 + 1"
    assert read(PLAIN, instruction="a", input="b", output="c") == "a\n\nb\n\nc"
    assert read(PLAIN, question="a", answer="b") == "a\n\nb"


def test_a_column_by_name() -> None:
    assert read(CHAT, "body", body="b", text="t") == "b"
    assert read(CHAT, "chosen", chosen=TURNS, text="t") == RENDERED
    for fields in ({"text": "t"}, {"body": 5, "text": "t"}, {"body": None, "text": "t"}):
        with pytest.raises(ReapError, match="here: .*body"):
            read(CHAT, "body", **fields)


def test_a_template_that_wants_arguments_as_they_are() -> None:
    joins = make_tokenizer(
        chat_template="{% for m in messages %}{% for c in m.tool_calls %}"
        "{{ 'call ' + c.function.arguments }}{% endfor %}{% endfor %}"
    )
    assert read(joins, messages=[CALLED | {"tool_calls": [AS_STRING]}]) == 'call {"a": 1}'


@pytest.mark.parametrize(
    "fields", [{"text": ""}, {"text": "", "label": 1}, {"prompt": "", "completion": ""}]
)
def test_empty_rows_are_counted(fields: dict[str, Any]) -> None:
    tally = Tally()
    assert sample_text(fields, "here", CHAT, "", tally) is None
    assert tally.counts()["empty"] == 1 and tally.lines() == ["1 row left out as empty"]


PARTS = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]


def test_turns_as_tables_and_other_programs_have_them() -> None:
    """Fields that are null are not there, parts that a template cannot print are joined, and a
    conversation may be in two columns."""
    nulls = {"tool_calls": None, "reasoning_content": None}
    asks = make_tokenizer(
        chat_template="{% for m in messages %}{{ m.tool_calls[0] if 'tool_calls' in m else "
        "m.content }}{% endfor %}"
    )
    assert read(asks, messages=[turn | nulls for turn in TURNS]) == "hiyo"
    assert read(NO_TOOLS, messages=[{"role": "user", "content": PARTS}]) == "[user]hi"
    lists = make_tokenizer(
        chat_template="{% for m in messages %}{% for p in m.content %}({{ p.text }}){% endfor %}"
        "{% endfor %}"
    )
    assert read(lists, messages=[{"role": "user", "content": PARTS}]) == "(h)(i)"
    assert read(CHAT, prompt=TURNS[:1], completion=TURNS[1:]) == RENDERED
    asked: dict[str, Any] = {"instruction": "hi", "output": "yo", "history": [["a", "b"]]}
    assert read(CHAT, **asked) == "[user]a[assistant]b" + RENDERED


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_by_any_name(name: str) -> None:
    thinks = make_tokenizer(
        chat_template="{% for m in messages %}<{{ m.reasoning_content }}>{{ m.content }}"
        "{% endfor %}"
    )
    turn = {"role": "assistant", "content": "yo", name: "why"}
    assert read(thinks, messages=[turn]) == "<why>yo"
    tally = Tally()
    assert sample_text({"messages": [turn]}, "here", NO_TOOLS, "", tally) is not None
    assert tally.lines() == [f"1 row used without {name}, which the chat template does not show"]


def test_calls_that_have_no_place_are_counted() -> None:
    tally = Tally()
    turn = {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]}
    found = sample_text({"messages": [turn]}, "here", NO_TOOLS, "", tally)
    assert found is not None and found.text == "[assistant]"
    assert tally.counts()["unused"] == {"tool_calls": 1}


def test_tools_that_have_no_place_are_counted() -> None:
    tally = Tally()
    rows = [{"messages": TURNS, "tools": [TOOL]}, {"query": "a", "answers": "b", "tools": [TOOL]}]
    for row, tokenizer in zip(rows, (NO_TOOLS, PLAIN), strict=True):
        assert sample_text(row, "here", tokenizer, "", tally) is not None
    assert tally.unused == {"tools": 2} and "2 rows used without tools" in tally.lines()[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, 'needs "text"'),
        ({"instruction": "a"}, "it has instruction; FILE:COLUMN names"),
        ({"question": "a", "answers": {"text": ["b"]}}, "it has answers, question"),
        ({"messages": "not turns"}, 'needs "text"'),
        ({"messages": TURNS, "tools": "nonsense"}, '"tools" is neither a list'),
        ({"conversations": [{"from": "martian", "value": "a"}]}, "'martian', which is none of"),
        ({"messages": [{"speaker": "a", "utterance": "b"}]}, "a turn has speaker, utterance"),
        ({"messages": [{"role": "user"}]}, "a turn has role"),
        ({"messages": [{"role": "user", "content": None}]}, "a turn has role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "part of type 'image'"),
    ],
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ReapError) as error:
        read(CHAT, **fields)
    assert message in str(error.value) and str(error.value).startswith("here: ")


def test_a_template_that_prints_nothing() -> None:
    with pytest.raises(ReapError, match="makes no text of its messages"):
        read(make_tokenizer(chat_template="{# nothing #}"), messages=TURNS)
