"""How well a model predicts text, and how far it strayed from a teacher, per domain."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn

from reap.errors import ReapError
from reap.planning.plan import Plan
from reap.runs.masking import mask_of
from reap.text.batching import Batch, Batches, batches_in, check_ids

TOTAL = "total"
_SUMS = 5
_CHUNK = 1 << 24  # logits that are held in fp32 at a time (64 MiB)

Students = dict[str, Callable[[], AbstractContextManager[None]]]  # name -> what makes the model it


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


@overload
def evaluate(
    model: Any,
    batches: Iterable[Batch | Mapping[str, Any]],
    *,
    teacher: Any | None = None,
    plans: None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Evaluation]: ...


@overload
def evaluate(
    model: Any,
    batches: Iterable[Batch | Mapping[str, Any]],
    *,
    teacher: Any | None = None,
    plans: Mapping[str, Plan | str | os.PathLike[str]],
    progress: Callable[[int], None] | None = None,
) -> dict[str, dict[str, Evaluation]]: ...


def evaluate(
    model: Any,
    batches: Iterable[Batch | Mapping[str, Any]],
    *,
    teacher: Any | None = None,
    plans: Mapping[str, Plan | str | os.PathLike[str]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Evaluation] | dict[str, dict[str, Evaluation]]:
    """An Evaluation per domain in order of appearance, and the one over all tokens as "total".

    With `plans`, name -> plan (or the file of one), that is by name of the plan: the model is
    masked by each (`masked`) and compared with itself, unmasked, or with `teacher`, whose logits
    are computed once, all in one pass over the text.

    Models run as they are (dtype, device), in eval mode, without gradients; logits are turned to
    fp32 a chunk at a time (of several plans the teacher's are kept so, [N,V] of a batch) and sums
    are fp64. `progress` is called with each batch's tokens.
    ReapError when there is nothing to predict, when model, teacher and tokenizer differ in
    vocabulary, when a loss or divergence is not finite, and as of `masked` for each plan before
    anything runs."""
    for name, each in (("model", model), ("teacher", teacher)):
        if each is not None and not isinstance(each, nn.Module):
            raise ReapError(
                f"{name} is a {type(each).__name__}: it must be a model, for example one of "
                "AutoModelForCausalLM.from_pretrained(folder)"
            )
    students: Students = {"": nullcontext}
    reference = teacher
    if plans is not None:
        students, reference = _masks(model, plans), model if teacher is None else teacher
    sums: dict[str, dict[str, Tensor]] = {name: {} for name in students}
    if isinstance(batches, Batches):
        check_domains(source["domain"] for source in batches.describe()["sources"])
    with _evaluating(model, reference):
        for batch in batches_in(batches):
            check_domains([batch.domain])
            for name, added in _batch_sums(model, students, reference, batch):
                if not added.isfinite().all():
                    raise ReapError(
                        f"{f'plan {name}, ' if name else ''}domain {batch.domain!r}: the loss is "
                        "not finite: the weights hold NaN or Inf, or their dtype overflows"
                    )
                sums[name][batch.domain] = sums[name].get(batch.domain, 0) + added
            if progress is not None:
                progress(batch.tokens)
    results = {name: _evaluations(rows, reference is not None) for name, rows in sums.items()}
    return results[""] if plans is None else results


def check_domains(names: Iterable[str]) -> None:
    """ReapError for one that results call something else."""
    if TOTAL in names:
        raise ReapError(
            f"domain {TOTAL!r} is the name of the sum over domains: call the text otherwise (in "
            "`reap evaluate` with --domain)"
        )


def _masks(model: Any, plans: Mapping[str, Plan | str | os.PathLike[str]]) -> Students:
    if not plans:
        raise ReapError("plans names no plan: leave it out to evaluate the model as it is")
    masks: Students = {}
    for name, plan in plans.items():
        try:
            masks[name] = mask_of(model, plan).entered
        except ReapError as error:
            raise ReapError(f"plan {name}: {error}") from error
    return masks


@contextmanager
def _evaluating(*models: Any) -> Iterator[None]:
    """Inside, the models are in eval mode."""
    modes = [(each, each.training) for each in models if each is not None]
    try:
        for each, _ in modes:
            each.eval()
        yield
    finally:
        for each, training in modes:
            each.train(training)


def _evaluations(sums: dict[str, Tensor], with_teacher: bool) -> dict[str, Evaluation]:
    total = sum(sums.values(), torch.zeros(_SUMS, dtype=torch.float64))
    if total[0] == 0:
        raise ReapError("nothing to evaluate: no row has two tokens")
    measured = {domain: row for domain, row in sums.items() if row[0] > 0}
    return {
        domain: _evaluation(row, with_teacher)
        for domain, row in (measured | {TOTAL: total}).items()
    }


def _evaluation(sums: Tensor, with_teacher: bool) -> Evaluation:
    loss, kl, agreement, teacher_loss = (sums[1:] / sums[0]).tolist()
    perplexity = math.exp(loss) if loss < 700 else math.inf
    if not with_teacher:
        return Evaluation(int(sums[0]), loss, perplexity)
    return Evaluation(int(sums[0]), loss, perplexity, kl, agreement, teacher_loss)


def _batch_sums(
    model: Any, students: Students, reference: Any | None, batch: Batch
) -> Iterator[tuple[str, Tensor]]:
    """Of every student, sums over the batch's predicted tokens: their number, loss, KL,
    agreements, the teacher's loss; [_SUMS] fp64. Inside of a student's context, `model` is it."""
    check_ids(model, batch)
    seen = batch.attention_mask.bool()
    counted = seen[:, 1:] & seen[:, :-1]  # [B, L-1]
    if batch.counted is not None:
        counted &= batch.counted[:, 1:] != 0
    targets = batch.input_ids[:, 1:][counted]  # [N] int64
    teacher = None
    if reference is not None:
        logits = _logits(reference, batch, counted)  # [N, V], the model's dtype
        teacher = _Teacher(logits, targets, keep=len(students) > 1)
    for name, student in students.items():
        with student():
            logits = _logits(model, batch, counted)
        sums = _student_sums(logits, targets, teacher)
        del logits  # before the next ones are there
        yield name, sums


@torch.inference_mode()
def _student_sums(logits: Tensor, targets: Tensor, teacher: _Teacher | None) -> Tensor:
    if teacher is not None and teacher.vocabulary != logits.shape[-1]:
        raise ReapError(
            f"the model predicts {logits.shape[-1]} tokens and the teacher {teacher.vocabulary}: "
            "both need the same tokenizer"
        )
    sums = torch.zeros(_SUMS, dtype=torch.float64)
    rows = max(1, _CHUNK // logits.shape[-1])
    for start in range(0, len(targets), rows):
        chunk = slice(start, start + rows)
        log_q = logits[chunk].float().log_softmax(-1)  # [n, V]
        row = [float(len(targets[chunk])), _loss(log_q, targets[chunk]), 0.0, 0.0, 0.0]
        if teacher is not None:
            log_p, top, row[4] = teacher(chunk)
            log_p, top = log_p.to(log_q.device), top.to(log_q.device)
            p = log_p.exp()
            divergence = torch.where(p == 0, 0.0, p * (log_p - log_q))  # 0 log 0 is 0
            row[2] = divergence.sum(dtype=torch.float64).item()
            row[3] = (logits[chunk].argmax(-1) == top).sum().item()
        sums += torch.tensor(row, dtype=torch.float64)
    return sums


class _Teacher:
    """What a batch's students are compared with: logits [N,V] of their targets [N].

    Called with a slice of tokens: log p [n,V] fp32, the likeliest tokens [n], and the sum of their
    losses. `keep`: for those who ask again.
    """

    def __init__(self, logits: Tensor, targets: Tensor, *, keep: bool) -> None:
        self._logits, self._targets, self._keep = logits, targets, keep
        self.vocabulary: int = logits.shape[-1]
        self._kept: dict[int, tuple[Tensor, Tensor, float]] = {}

    def __call__(self, chunk: slice) -> tuple[Tensor, Tensor, float]:
        known = self._kept.get(chunk.start)
        if known is None:
            logits = self._logits[chunk]
            log_p = logits.float().log_softmax(-1)
            known = log_p, logits.argmax(-1), _loss(log_p, self._targets[chunk])
            if self._keep:
                self._kept[chunk.start] = known
        return known


@torch.inference_mode()
def _logits(model: Any, batch: Batch, counted: Tensor) -> Tensor:
    device = model.device
    logits = model(
        input_ids=batch.input_ids.to(device),
        attention_mask=batch.attention_mask.to(device),
        use_cache=False,
    ).logits
    return logits[:, :-1][counted.to(logits.device)]


def _loss(log_p: Tensor, targets: Tensor) -> float:
    """The sum over rows of what log_p [N, V] costs the targets [N]."""
    picked = log_p.gather(1, targets.to(log_p.device)[:, None])
    return -picked.double().sum().item()
