"""Rows of token ids: packed one behind the other, or one document per row."""

import json

import torch
from test_batching import TOKENIZER, make_tokenizer, text_of
from test_batching import here as here
from transformers import PreTrainedTokenizerFast

from reap.text.batching import batches


def test_packing_joins_documents_and_pads_only_the_last_row(here):
    lines = [{"text": "abcde"}, {"text": "fg"}, {"text": ""}, {"text": "hijkl"}]
    (here / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (first, second) = batches(["a.jsonl"], TOKENIZER, seq_len=4, batch_size=3)
    assert first.input_ids.shape == (3, 4) and first.input_ids.dtype == torch.int64
    assert text_of(first) == ["abcd", "e<end>fg", "<end>hij"]
    assert text_of(second) == ["kl<end>"] and second.attention_mask.tolist() == [[1, 1, 1, 0]]
    assert (first.tokens, second.tokens, second.domain) == (12, 3, "a")


def test_one_sample_per_row_is_cut_and_padded_on_the_right(here):
    lines = [{"text": "abcdefgh"}, {"text": "xy"}, {"text": ""}, {"text": "z"}]
    (here / "a.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    first, second = batches(["a.jsonl"], TOKENIZER, seq_len=5, batch_size=2, packing=False)
    assert text_of(first) == ["abcde", "xy"] and text_of(second) == ["z"]
    assert first.attention_mask.tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert (first.input_ids[1, 2:] == TOKENIZER.pad_token_id).all()


def test_documents_that_are_cut_or_have_no_tokens_are_counted(here):
    (here / "a.jsonl").write_text("\n".join(json.dumps({"text": "x" * n}) for n in (9, 3, 5, 4)))
    (here / "b.txt").write_text("y" * 1000)
    rows = batches(["a.jsonl", "b.txt"], TOKENIZER, seq_len=4, packing=False)
    list(rows)
    assert [source["cut"] for source in rows.describe()["sources"]] == [2, 1]
    assert rows.notes()[0] == "a.jsonl: 2 rows cut to the row's length"
    rows = batches("a.jsonl", TOKENIZER, seq_len=4)
    list(rows)
    assert rows.notes() == []

    class Drops(PreTrainedTokenizerFast):
        def __call__(self, text, **options):
            return super().__call__(text.strip(), **options)

    (here / "a.jsonl").write_text('{"text": "x"}\n{"text": "  "}')
    for packing in (True, False):
        rows = batches("a.jsonl", make_tokenizer(Drops), packing=packing)
        list(rows)
        assert rows.describe()["sources"][0]["empty"] == 1
