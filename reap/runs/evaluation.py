"""How well a model predicts text, and how far it strayed from a teacher, per domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reap.errors import ReapError
from reap.text.batching import Batch, batches_in, check_ids

TOTAL = "total"
_SUMS = 5
_CHUNK = 1 << 24  # logits that are held in fp32 at a time (64 MiB)


@dataclass(frozen=True)
class Evaluation:
    """Means over the predicted tokens: tokens that are not padding and follow one that is not, and
    of these the counted ones where a batch says which do (`Batch.counted`)."""

    tokens: int
    loss: float  # cross entropy, nats per token
    perplexity: float  # exp(loss)
    kl: float | None = None  # KL(teacher || student), nats per token
    agreement: float | None = None  # share of tokens where both models' first choice is the same
    teacher_loss: float | None = None  # the teacher's own cross entropy, nats per token

    def to_json(self) -> dict[str, float]:
        """Its fields, those against a teacher only where there was one."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def evaluate(
    model: Any,
    batches: Iterable[Batch | Mapping[str, Any]],
    *,
    teacher: Any | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Evaluation]:
    """An Evaluation per domain in order of appearance, and the one over all tokens as "total".

    Models run as they are (dtype, device), in eval mode, without gradients; logits are turned to
    fp32 a chunk at a time and sums are fp64. `progress` is called with each batch's tokens.
    ReapError when there is nothing to predict, when model, teacher and tokenizer differ in
    vocabulary, and when a loss or divergence is not finite."""
    sums: dict[str, Tensor] = {}
    models = [model] if teacher is None else [model, teacher]
    for name, each in zip(("model", "teacher"), models, strict=False):
        if not isinstance(each, nn.Module):
            raise ReapError(
                f"{name} is a {type(each).__name__}: it must be a model, for example one of "
                "AutoModelForCausalLM.from_pretrained(folder)"
            )
    modes = [each.training for each in models]
    try:
        for each in models:
            each.eval()
        for batch in batches_in(batches):
            if batch.domain == TOTAL:
                raise ReapError(f"domain {TOTAL!r} is the name of the sum over domains: rename it")
            added = _batch_sums(models, batch)
            if not added.isfinite().all():
                raise ReapError(
                    f"domain {batch.domain!r}: the loss is not finite: the weights hold NaN or "
                    "Inf, or their dtype overflows"
                )
            sums[batch.domain] = sums.get(batch.domain, 0) + added
            if progress is not None:
                progress(batch.tokens)
    finally:
        for each, training in zip(models, modes, strict=True):
            each.train(training)
    total = sum(sums.values(), torch.zeros(_SUMS, dtype=torch.float64))
    if total[0] == 0:
        raise ReapError("nothing to evaluate: no row has two tokens")
    measured = {domain: row for domain, row in sums.items() if row[0] > 0}
    return {
        domain: _evaluation(row, teacher is not None)
        for domain, row in (measured | {TOTAL: total}).items()
    }


def _evaluation(sums: Tensor, with_teacher: bool) -> Evaluation:
    loss, kl, agreement, teacher_loss = (sums[1:] / sums[0]).tolist()
    perplexity = math.exp(loss) if loss < 700 else math.inf
    if not with_teacher:
        return Evaluation(int(sums[0]), loss, perplexity)
    return Evaluation(int(sums[0]), loss, perplexity, kl, agreement, teacher_loss)


@torch.inference_mode()
def _batch_sums(models: list[Any], batch: Batch) -> Tensor:
    """Sums over the batch's predicted tokens: their number, loss, KL, agreements, the teacher's
    loss; [_SUMS] fp64."""
    check_ids(models[0], batch)
    seen = batch.attention_mask.bool()
    counted = seen[:, 1:] & seen[:, :-1]  # [B, L-1]
    if batch.counted is not None:
        counted &= batch.counted[:, 1:] != 0
    targets = batch.input_ids[:, 1:][counted]  # [N] int64
    logits = [_logits(model, batch, counted) for model in models]  # [N, V] each, model's dtype
    vocabularies = [each.shape[-1] for each in logits]
    if len(set(vocabularies)) > 1:
        raise ReapError(
            f"the model predicts {vocabularies[0]} tokens and the teacher {vocabularies[1]}: "
            "both need the same tokenizer"
        )
    sums = torch.zeros(_SUMS, dtype=torch.float64)
    rows = max(1, _CHUNK // vocabularies[0])
    for start in range(0, len(targets), rows):
        chunk = slice(start, start + rows)
        sums += _chunk_sums(targets[chunk], *(each[chunk] for each in logits))
    return sums


def _logits(model: Any, batch: Batch, counted: Tensor) -> Tensor:
    device = model.device
    logits = model(
        input_ids=batch.input_ids.to(device),
        attention_mask=batch.attention_mask.to(device),
        use_cache=False,
    ).logits
    return logits[:, :-1][counted.to(logits.device)]


def _chunk_sums(targets: Tensor, student: Tensor, teacher: Tensor | None = None) -> Tensor:
    log_q = student.float().log_softmax(-1)  # [N, V]
    sums = [float(len(targets)), _loss(log_q, targets), 0.0, 0.0, 0.0]
    if teacher is not None:
        log_p = teacher.to(log_q.device).float().log_softmax(-1)
        p = log_p.exp()
        divergence = torch.where(p == 0, 0.0, p * (log_p - log_q))  # 0 log 0 is 0
        sums[2] = divergence.double().sum().item()
        sums[3] = (student.argmax(-1) == teacher.to(student.device).argmax(-1)).sum().item()
        sums[4] = _loss(log_p, targets)
    return torch.tensor(sums, dtype=torch.float64)


def _loss(log_p: Tensor, targets: Tensor) -> float:
    """The sum over rows of what log_p [N, V] costs the targets [N]."""
    picked = log_p.gather(1, targets.to(log_p.device)[:, None])
    return -picked.double().sum().item()
