"""Greedy text of a model, and how it reads: loops, endings, variety, distance from the original."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from experiments.measures import distinct, jensen_shannon, loops

Changed = Callable[[], AbstractContextManager[Any]]  # inside it, the model is the changed one
AT_ONCE = 256
GRAMS = (2, 3, 4)


@torch.inference_mode()
def greedy(model: Any, prompts: Tensor, new_tokens: int) -> Tensor:
    """The most likely continuations of prompts [N,P] without padding. [N,new_tokens], filled up
    with the padding token behind an end of text."""
    end, pad = model.config.eos_token_id, model.config.pad_token_id
    found = []
    for part in prompts.split(AT_ONCE):
        out = model.generate(
            input_ids=part,
            attention_mask=torch.ones_like(part),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=pad,
        )[:, part.shape[1] :]
        short = new_tokens - out.shape[1]
        found.append(torch.nn.functional.pad(out, (0, short), value=pad))
    return torch.cat(found)


def until_end(row: Tensor, end: int) -> list[int]:
    """The tokens before the end of text."""
    ids = row.tolist()
    return ids[: ids.index(end)] if end in ids else ids


def read(texts: Tensor, end: int) -> dict[str, Any]:
    """Of texts [N,T]: how many there are, loop and end, and their variety."""
    rows = [until_end(row, end) for row in texts]
    return {
        "texts": len(rows),
        "loops": sum(map(loops, rows)),
        "ended": sum(end in row.tolist() for row in texts),
        "distinct": {str(n): distinct(rows, n) for n in GRAMS},
    }


@torch.inference_mode()
def compared(
    model: Any, changed: Changed, prompts: Tensor, texts: Tensor, end: int
) -> dict[str, Any]:
    """The changed model's own texts [N,T], as the original sees them: their loss, in nats per token
    (cross-perplexity is its exponential), and by position the divergence of the next-token
    distributions, mean over the texts that have not ended. A loop is cheap for either model."""
    ids = torch.cat([prompts, texts], 1)
    first = prompts.shape[1] - 1
    original = model(input_ids=ids, use_cache=False).logits[:, first:-1]  # [N,T,V]
    with changed():
        other = model(input_ids=ids, use_cache=False).logits[:, first:-1]
    before = (texts == end).long().cumsum(1) - (texts == end).long() == 0  # the end itself counts
    losses = -original.float().log_softmax(-1).gather(2, texts[:, :, None])[:, :, 0]
    divergence = jensen_shannon(original, other)
    by_position = (divergence * before).sum(0) / before.sum(0).clamp(min=1)
    return {
        "cross_loss": float(losses[before].double().mean()),
        "divergence": by_position.tolist(),
    }


@torch.inference_mode()
def right_answers(model: Any, rows: Tensor, answer_tokens: int, group: int) -> int:
    """Of rows [N,P] the number whose own last tokens are more likely to the model than those of
    the three rows that follow in the same group."""
    start, answers = rows[:, :-answer_tokens], rows[:, -answer_tokens:]
    scores = []
    for away in range(4):
        others = torch.cat([part.roll(-away, 0) for part in answers.split(group)])
        ids = torch.cat([start, others], 1)
        logits = model(input_ids=ids, use_cache=False).logits[:, -answer_tokens - 1 : -1]
        picked = logits.float().log_softmax(-1).gather(2, others[:, :, None])
        scores.append(picked.sum((1, 2)))
    return int((torch.stack(scores).argmax(0) == 0).sum())
