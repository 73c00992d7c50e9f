"""Which tokens count: after a marker, or the assistant's; the others run all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_batching import CHAT, TOKENIZER, make_tokenizer
from tiny import tiny_model
from typer.testing import CliRunner

from reap.app.cli import app
from reap.errors import ReapError
from reap.runs.calibration import calibrate
from reap.runs.partial import Partial
from reap.statistics.stats import Statistics
from reap.text import localfiles
from reap.text.batching import Batch, Batches, batches
from reap.text.counted import said

TURNS = make_tokenizer(
    chat_template="{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}.{%- endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "{% endfor %}"
)
MODEL = Path(__file__).parent.parent / "models" / "tiny-qwen3-moe"
THINK = make_tokenizer()
THINK.add_tokens(["</think>"])
THOUGHTS = ["why? so</think>yes, so", "no mark", "</think>", "a</think>b</think>c"]


class Slow:
    """A tokenizer without offsets, as those in Python are."""

    eos_token_id = pad_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        ids: list[int] = []
        for part in text.split("</think>"):
            ids += [ord(letter) % 60 for letter in part] + [63]
        return {"input_ids": ids[:-1]}

    def get_added_vocab(self) -> dict[str, int]:
        return {"</think>": 63}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: Any) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"text": text}) for text in THOUGHTS]
    Path("a.jsonl").write_text("\n".join(rows))
    return tmp_path


def read(specs: list[str], tokenizer: Any = TOKENIZER, **options: Any) -> tuple[str, Batches]:
    """The text of what counts, rows and stretches apart, and the batches."""
    rows = batches(specs, tokenizer, **options)
    said = []
    for batch in rows:
        assert batch.counted is not None and batch.counted.dtype == torch.bool
        assert not (batch.counted & (batch.attention_mask == 0)).any()
        for ids, counted in zip(batch.input_ids, batch.counted, strict=True):
            shown = [
                tokenizer.decode([token]) if counts else "|"
                for token, counts in zip(ids.tolist(), counted.tolist(), strict=True)
            ]
            said.append("|".join(filter(None, "".join(shown).split("|"))))
    return " / ".join(said), rows


@pytest.mark.parametrize("tokenizer", [TOKENIZER, THINK], ids=["bytes", "one token"])
@pytest.mark.parametrize("seq_len", [5, 7, 99])
def test_what_follows_the_first_marker_of_a_document(here: Path, tokenizer: Any, seq_len) -> None:
    """Also over the cuts of packing; the end of a document goes with it."""
    told, rows = read(["a.jsonl"], tokenizer=tokenizer, seq_len=seq_len, count_after="</think>")
    assert told.replace(" / ", "|").replace("|", "") == "yes, so<end>b</think>c<end>"
    plain = batches(["a.jsonl"], tokenizer, seq_len=seq_len)
    for batch, marked in zip(plain, batches(["a.jsonl"], tokenizer, seq_len=seq_len), strict=True):
        assert torch.equal(batch.input_ids, marked.input_ids)  # what runs does not change
    marks = 1 if tokenizer is THINK else 8
    assert rows.counted == 7 + 1 + 2 + marks + 1
    assert rows.describe()["counted"] == rows.counted == rows.describe()["sources"][0]["counted"]
    assert rows.describe()["count"] == {"after": "</think>"}
    assert rows.notes() == [
        f"{rows.tokens:,} tokens ran, {rows.counted} of them count: those after '</think>'",
        "a.jsonl: 2 rows ran without a token that counts",
    ]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("block", [1, 5, 1000])
def test_spans_between_markers(here: Path, monkeypatch: Any, packing: bool, block: int) -> None:
    """Every one, with its end: the turns of a chat whose template marks none."""
    chat = "<u>hi</e><a>yo</e><u>and</e><a>so</e>\n<a>open"
    Path("c.txt").write_text(chat)
    monkeypatch.setattr(localfiles, "_BLOCK", block)
    options: dict[str, Any] = {"count_after": "<a>", "count_until": "</e>", "packing": packing}
    told, rows = read(["c.txt"], seq_len=99, **options)
    assert told == "yo</e>|so</e>|open" + "<end>" * packing
    assert rows.describe()["count"] == {"after": "<a>", "until": "</e>"}
    assert "those after '<a>' until '</e>'" in rows.notes()[0]


def test_one_marker_may_be_both(here: Path) -> None:
    Path("c.txt").write_text("a``b``c``")
    told, _ = read(["c.txt"], seq_len=99, count_after="``", count_until="``")
    assert told == "b``"


def test_one_sample_per_row(here: Path) -> None:
    told, rows = read(["a.jsonl"], seq_len=99, count_after="</think>", packing=False, batch_size=4)
    assert told == "yes, so /  /  / b</think>c"
    cut, rows = read(["a.jsonl"], seq_len=17, count_after="</think>", packing=False)
    assert cut == "ye /  /  / b</think"
    assert "3 rows ran" not in rows.notes()[1]
    with pytest.raises(ReapError, match=r"'a.jsonl': of its 31 tokens none counts, .* '</think>'"):
        list(batches(["a.jsonl"], TOKENIZER, seq_len=8, count_after="</think>", packing=False))


@pytest.mark.parametrize("block", [1, 3, 8, 1000])
def test_a_marker_over_the_blocks_of_a_file(here: Path, monkeypatch: Any, block: int) -> None:
    Path("long.txt").write_text("1234567 <mark> é after <mark> more")
    Path("other.txt").write_text("no marker here, only <mar and k>")
    monkeypatch.setattr(localfiles, "_BLOCK", block)
    (batch,) = batches(["long.txt"], TOKENIZER, seq_len=99, count_after="<mark>")
    assert TOKENIZER.decode(batch.input_ids[batch.counted]) == " é after <mark> more<end>"
    with pytest.raises(ReapError, match=r"'other.txt': of its .* none counts"):
        batches(["long.txt", "other.txt"], TOKENIZER, count_after="<mark>").read_ahead()


def test_a_token_that_reaches_over_the_marker_s_end_does_not_count(here: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["k> "])
    Path("a.txt").write_text("x <mark> y")
    told, _ = read(["a.txt"], tokenizer=tokenizer, seq_len=9, count_after="<mark>")
    assert told == "y<end>"


def test_a_tokenizer_without_offsets(here: Path) -> None:
    told, rows = read_ids(Slow(), "</think>")
    assert rows.counted == 7 + 3
    assert told[0] == [ord(letter) % 60 for letter in "yes, so"]
    told, _ = read_ids(Slow(), "</think>", count_until="</think>")
    assert told[3] == [ord("b") % 60, 63]
    with pytest.raises(ReapError, match=r"'so': Slow does not say .* a token of its own"):
        batches(["a.jsonl"], Slow(), count_after="so")


def read_ids(tokenizer: Any, marker: str, **options: Any) -> tuple[list[list[int]], Batches]:
    how = options | {"count_after": marker}
    rows = batches(["a.jsonl"], tokenizer, seq_len=99, packing=False, **how)
    return [batch.input_ids[batch.counted].tolist() for batch in rows], rows


def conversation(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(turns)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]}


@pytest.mark.parametrize("packing", [True, False])
def test_the_assistant_s_turns(here: Path, packing: bool) -> None:
    rows = [conversation("hi", "yo", "and", "so"), {"prompt": "q", "completion": "a"}]
    rows += [{"text": "plain text"}, conversation("unanswered")]
    Path("c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told, found = read(
        ["c.jsonl"], tokenizer=TURNS, seq_len=128, count="assistant", packing=packing, batch_size=4
    )
    end = "<end>" * packing
    assert (
        told.replace(" /", "").split()
        == f"yo.|so.{end} a.{end}".replace(" ", "|" if packing else " ").split()
    )
    assert found.describe()["count"] == "assistant"
    assert "2 rows ran without a token that counts" in found.notes()[1]
    plain = batches(["c.jsonl"], TURNS, seq_len=128, packing=packing, batch_size=4)
    again = batches(
        ["c.jsonl"], TURNS, seq_len=128, packing=packing, batch_size=4, count="assistant"
    )
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)


@pytest.mark.parametrize(
    ("tokenizer", "options", "message"),
    [
        (CHAT, {"count": "assistant"}, r"template of Token\w+ does not mark .* by {% generation"),
        (CHAT, {"count": "assistant"}, "give count_after and count_until"),
        (TOKENIZER, {"count": "assistant"}, "has no chat template"),
        (TURNS, {"count": "asistant"}, "must be all or assistant"),
        (TURNS, {"count": "assistant", "count_after": "x"}, "choose one"),
        (TOKENIZER, {"count_until": "x"}, "needs count_after"),
        (TOKENIZER, {"count_after": ""}, "must be text that the samples hold"),
        (TOKENIZER, {"count_after": 7}, "must be text that the samples hold"),
    ],
)
def test_what_cannot_be_told_is_refused(
    here: Path, tokenizer: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ReapError, match=message):
        batches(["a.jsonl"], tokenizer, **options)


def test_a_marker_that_never_occurs_is_an_error_before_the_model_runs(here: Path) -> None:
    Path("b.jsonl").write_text('{"text": "has <it> indeed"}')
    rows = batches(["a.jsonl", "b.jsonl"], TOKENIZER, seq_len=16, count_after="<it>")
    with pytest.raises(ReapError, match=r"'a.jsonl': .* none counts, which are to be those after"):
        rows.read_ahead()


def test_limits_cut_what_counts_as_well(here: Path) -> None:
    rows = batches(["a.jsonl"], TOKENIZER, seq_len=8, max_tokens=19, count_after="</think>")
    assert sum(int(batch.counted.sum()) for batch in rows if batch.counted is not None) == 4
    assert (rows.tokens, rows.counted) == (19, 4)


def test_statistics_are_of_the_counted_tokens_alone(here: Path) -> None:
    """All run: what is counted is what the same tokens have in a whole run."""
    model = tiny_model("qwen3_moe")
    options: dict[str, Any] = {"seq_len": 16, "batch_size": 2, "count_after": "</think>"}

    def text(**changed: Any) -> Batches:
        return batches(["a.jsonl"], Slow(), **options | changed)

    parts = calibrate(model, text(), pairs=True)
    others = [
        Batch(
            batch.input_ids,
            batch.attention_mask,
            batch.domain,
            ~batch.counted if batch.counted is not None else None,
        )
        for batch in text()
    ]
    rest = calibrate(model, others, pairs=True)
    whole = calibrate(model, text(count_after=None), pairs=True)
    assert parts.tokens == 10 and parts.domains == ("a",)
    assert parts + rest == whole
    (about,) = parts.data
    assert (about["tokens"], about["counted"]) == (whole.tokens, 10)
    assert about["count"] == {"after": "</think>"} and whole.data[0]["count"] is None


def test_a_mapping_says_what_counts() -> None:
    model = tiny_model("qwen3_moe")
    ids = torch.arange(20, 38).view(2, 9)
    counted = torch.zeros(2, 9, dtype=torch.int64)
    counted[1, 4:] = 1
    assert calibrate(model, [{"input_ids": ids, "counted": counted}]).tokens == 5
    with pytest.raises(ReapError, match="counted of a batch must have the shape"):
        Batch.of({"input_ids": ids, "counted": counted[0]})
    with pytest.raises(ReapError, match="no tokens that count"):
        calibrate(model, [{"input_ids": ids, "counted": counted * 0}])


def test_a_run_is_taken_up_with_the_same_option_alone(here: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("reap.runs.partial._SHARE", float("inf"))
    model = tiny_model("qwen3_moe")

    def text(**options: Any) -> Batches:
        return batches(["a.jsonl"], Slow(), seq_len=8, **options)

    whole = calibrate(model, text(count_after="</think>"))
    calls = iter(range(9))

    def stop(*_: Any) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt

    handle, partial = model.model.register_forward_pre_hook(stop), Partial(here / "kept")
    with pytest.raises(KeyboardInterrupt), partial.kept():
        calibrate(model, text(count_after="</think>"), partial=partial)
    handle.remove()
    others: list[dict[str, Any]] = [{}, {"count_after": "so"}]
    for options in others:
        tokenizer = Slow()
        monkeypatch.setattr(tokenizer, "get_added_vocab", lambda: {"</think>": 63, "so": 9})
        other = batches(["a.jsonl"], tokenizer, seq_len=8, **options)
        with pytest.raises(ReapError, match="but count was .*'</think>'"):
            calibrate(model, other, partial=Partial(here / "kept"))
    partial = Partial(here / "kept")
    with partial.kept():
        pieces = calibrate(model, text(count_after="</think>"), partial=partial)
    assert pieces.digest() == whole.digest() and pieces.data == whole.data


def test_the_command_line(here: Path) -> None:
    text = json.dumps({"text": "def f(x):\n    return x\n# <it> follows here"})
    Path("b.jsonl").write_text("\n".join([text] * 3))
    run = [MODEL, "--data", "b.jsonl", "--seq-len", "32", "--out"]

    def reap(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    done = reap("calibrate", *run, "some.st", "--count-after", "<it>")
    assert done.exit_code == 0, done.stderr
    (about,) = Statistics.load("some.st").data
    assert Statistics.load("some.st").tokens == about["counted"] < about["tokens"]
    told = f"{about['tokens']:,} tokens ran, {about['counted']:,} of them count: those after '<it>'"
    assert told in done.stdout
    shown = reap("info", "some.st").stdout
    assert f"{about['counted']:,} of {about['tokens']:,} tokens, those after '<it>'" in shown
    for options, message in (
        (["--count-after", "<is>"], "'b.jsonl': of its"),
        (["--count", "assistant"], "{% generation %}"),
        (["--count", "some"], "must be all or assistant"),
    ):
        refused = reap("calibrate", *run, "other.st", *options)
        assert refused.exit_code == 2 and message in refused.stderr, refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
    assert not Path("other.st").exists()


def test_in_words() -> None:
    assert [said(None), said("assistant"), said({"after": "x"})] == [
        "all",
        "the assistant's",
        "those after 'x'",
    ]
