"""What a model writes behind the first tokens of a text, and how often that loops or ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reap.errors import ReapError
from reap.runs.evaluation import TOTAL, check_domains
from reap.text.batching import Batch, check_ids

PERIOD, REPEATS, LEAST = 32, 4, 24  # tokens, times, tokens: what counts as a loop
GRAM = 4
AT_ONCE = 16
Z = 1.959963984540054  # of 95%


class Share(NamedTuple):
    """A share of something counted, with its 95% interval."""

    share: float
    low: float
    high: float


def wilson(successes: int, trials: int) -> Share:
    """A share of `trials`, at least 1, with Wilson's score interval (J. Am. Stat. Assoc. 22, 1927),
    which holds for few and for none."""
    share = successes / trials
    scale = 1 + Z * Z / trials
    centre = (share + Z * Z / (2 * trials)) / scale
    half = Z * math.sqrt(share * (1 - share) / trials + Z * Z / (4 * trials * trials)) / scale
    # At the ends the interval ends there too, which rounding would miss.
    low = 0.0 if successes == 0 else centre - half
    return Share(share, low, 1.0 if successes == trials else centre + half)


def loops(row: Sequence[int]) -> bool:
    """Whether a text ends in a loop: for some period of at most PERIOD tokens its last tokens, of
    REPEATS periods and at least LEAST tokens, repeat with it."""
    for period in range(1, PERIOD + 1):
        tail = max(REPEATS * period, LEAST)
        if tail > len(row):
            continue
        start = len(row) - tail
        if all(row[i] == row[i - period] for i in range(start + period, len(row))):
            return True
    return False


def distinct(rows: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams of all rows, as a share of their n-grams (Li et al., arXiv 1510.03055); NaN
    where no row has one."""
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


@dataclass(frozen=True)
class Generation:
    """How the texts of a domain came out. `looped`: those that end in a loop (`loops`), `ended`:
    those that came to an end of text, `at_limit`: those that did not. `tokens`: generated, ends not
    counted; `distinct`: of their 4-grams, NaN without any."""

    texts: int
    tokens: int
    looped: int
    ended: int
    at_limit: int
    distinct: float

    @classmethod
    def of(cls, rows: Sequence[tuple[Sequence[int], bool]]) -> Generation:
        """Of texts, at least one: their tokens, and whether they ended."""
        texts = [ids for ids, _ in rows]
        ended = sum(end for _, end in rows)
        return cls(
            texts=len(rows),
            tokens=sum(map(len, texts)),
            looped=sum(map(loops, texts)),
            ended=ended,
            at_limit=len(rows) - ended,
            distinct=distinct(texts, GRAM),
        )

    def to_json(self) -> dict[str, Any]:
        """Its fields, and the shares of texts with their intervals."""
        shares = {
            f"{name}_share": wilson(getattr(self, name), self.texts)._asdict()
            for name in ("looped", "ended", "at_limit")
        }
        told = {**asdict(self), **shares}
        return told if self.distinct == self.distinct else {**told, "distinct": None}


def prompts_of(
    batches: Iterable[Batch | Mapping[str, Any]], number: int, tokens: int
) -> dict[str, Tensor]:
    """The first `tokens` tokens of `number` rows by domain, [n, tokens] int64: as many of each
    domain as it has rows for, and these spread over all of its rows that are longer.

    Fewer where there are fewer rows; ReapError where there is none."""
    rows: dict[str, list[Tensor]] = {}
    for batch in map(Batch.of, batches):
        long = batch.attention_mask[:, : tokens + 1].sum(1) > tokens
        starts = batch.input_ids[long & (batch.attention_mask[:, 0] == 1), :tokens]
        rows.setdefault(batch.domain, []).extend(starts)
    rows = {domain: found for domain, found in rows.items() if found}
    if not rows:
        raise ReapError(
            f"no row of the text is longer than prompt_tokens={tokens}: take fewer, or longer text"
        )
    counts = _shared_out({domain: len(found) for domain, found in rows.items()}, number)
    return {
        domain: torch.stack([found[place * len(found) // count] for place in range(count)])
        for domain, found in rows.items()
        if (count := counts[domain])
    }


def _shared_out(available: dict[str, int], number: int) -> dict[str, int]:
    """`number` in parts as equal as what is available allows; the first get what is over."""
    given = dict.fromkeys(available, 0)
    while number and (open_ := [name for name in given if given[name] < available[name]]):
        each, over = divmod(number, len(open_))
        for place, name in enumerate(open_):
            more = min(each + (place < over), available[name] - given[name])
            given[name] += more
            number -= more
    return given


def check_length(model: Any, prompt_tokens: int, new_tokens: int) -> None:
    """ReapError where a prompt and what is generated are longer than the model, or the config of
    one, can read."""
    config = getattr(model, "config", model)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and prompt_tokens + new_tokens > most:
        raise ReapError(
            f"prompt_tokens={prompt_tokens} and new_tokens={new_tokens} are more than the {most} "
            "tokens that the model reads: take fewer"
        )


def check_temperature(temperature: float | None) -> None:
    """ReapError for one that no text is drawn at."""
    if temperature is not None and not 0 < temperature < math.inf:
        raise ReapError(
            f"temperature is {temperature}: it has to be above 0; leave it out for the likeliest"
        )


def generate_texts(
    model: Any,
    prompts: Mapping[str, Tensor],
    new_tokens: int,
    *,
    temperature: float | None = None,
    seed: int = 0,
    at_once: int = AT_ONCE,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Generation]:
    """How `model` goes on behind prompts (`prompts_of`), per domain and over all as "total".

    The likeliest token each time, or with a `temperature` a drawn one, from the seed, without any
    penalty or filter of the model's own settings: those could hide a loop. A text ends at the
    model's end-of-text tokens or after `new_tokens`. The model runs as it is, masked too
    (`reap.masked`), `at_once` rows at a time; `progress` is called with the tokens of each. What
    torch draws elsewhere stays as it was.
    ReapError for what is longer than the model reads, ids that it does not embed, no prompts."""
    if not callable(getattr(model, "generate", None)):
        raise ReapError(
            f"model is a {type(model).__name__}: it must be a language model that generates"
        )
    if not prompts:
        raise ReapError("there are no prompts to generate from: see prompts_of")
    for name, value in (("new_tokens", new_tokens), ("at_once", at_once)):
        if value < 1:
            raise ReapError(f"{name} is {value}: it has to be at least 1")
    check_temperature(temperature)
    check_domains(prompts)
    for domain, rows in prompts.items():
        check_length(model, rows.shape[1], new_tokens)
        check_ids(model, Batch(rows, torch.ones_like(rows), domain))
    ends = _ends(model)
    settings = _settings(new_tokens, temperature, ends, _padding(model, ends))
    found: dict[str, list[tuple[list[int], bool]]] = {}
    with _set_up(model, settings, seed):
        for domain, rows in prompts.items():
            texts = found.setdefault(domain, [])
            for part in rows.split(at_once):
                texts += [_until(row, ends) for row in _continued(model, part)]
                if progress is not None:
                    progress(len(part) * new_tokens)
    results = {domain: Generation.of(texts) for domain, texts in found.items()}
    return results | {TOTAL: Generation.of([text for texts in found.values() for text in texts])}


@contextmanager
def _set_up(model: Any, settings: Any, seed: int) -> Iterator[None]:
    """Inside, these are all of the model's settings: of others than are given at a call, `generate`
    takes the model's own."""
    device, training, own = torch.device(model.device), model.training, model.generation_config
    model.eval()
    model.generation_config = settings
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        model.generation_config = own
        model.train(training)


@torch.inference_mode()
def _continued(model: Any, prompts: Tensor) -> list[list[int]]:
    ids = prompts.to(model.device)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
    return out[:, prompts.shape[1] :].tolist()


def _until(row: list[int], ends: list[int]) -> tuple[list[int], bool]:
    """The tokens before the first end of text, and whether there is one."""
    stop = next((place for place, token in enumerate(row) if token in ends), None)
    return row[:stop], stop is not None


def _ends(model: Any) -> list[int]:
    """The model's end-of-text tokens; [] where it names none, and no text ends."""
    for config in (getattr(model, "generation_config", None), model.config):
        end = getattr(config, "eos_token_id", None)
        if end is not None:
            return [end] if isinstance(end, int) else list(end)
    return []


def _padding(model: Any, ends: list[int]) -> int:
    """What a text that has ended is filled up with: it is cut off again."""
    pad = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
    return pad if isinstance(pad, int) else ends[0] if ends else 0


def _settings(new_tokens: int, temperature: float | None, ends: list[int], pad: int) -> Any:
    from transformers import GenerationConfig

    drawn = {} if temperature is None else {"temperature": temperature, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=temperature is not None,
        eos_token_id=ends or None,
        pad_token_id=pad,
        **drawn,
    )
