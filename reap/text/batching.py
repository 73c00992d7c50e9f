"""Sources to batches of token ids with a padding mask, each batch of one domain.

Nothing is read before it is needed, and nothing is read twice: a batch holds rows of one source,
and the next batch comes from the source that is furthest behind its share of the tokens.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike, fspath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reap.errors import ReapError
from reap.model.load import check_tokenizer, special_ids
from reap.text.counted import ALL, ASSISTANT, Counting, said
from reap.text.packing import HeldRow, Packer, Row
from reap.text.samples import Tally
from reap.text.share import Share
from reap.text.sources import Source, check_distinct, parse_spec, read, require_datasets

__all__ = ["Batch", "Batches", "Source", "batches", "parse_spec"]

Spec = str | PathLike[str] | Source
_SEEN_ENOUGH = 1024  # tokens of a source, among which one has to be of text
READ_AHEAD = 1 << 26  # tokens, of 4 bytes each


@dataclass(frozen=True)
class Batch:
    """Token rows of one domain. Padding is on the right and has mask 0. `counted`: which tokens
    the statistics (or the loss) are of, while all of them run; None: every one that is no
    padding."""

    input_ids: Tensor  # [B, L] int64
    attention_mask: Tensor  # [B, L] int64, 1 = a token, 0 = padding
    domain: str
    counted: Tensor | None = None  # [B, L] bool

    @property
    def tokens(self) -> int:
        """How many of the B * L positions are not padding: those that run."""
        return int(self.attention_mask.sum())

    @classmethod
    def of(cls, given: Any) -> Batch:
        """A batch as it is, or what a DataLoader yields: a mapping with input_ids [B,L] and perhaps
        attention_mask [B,L], domain and counted [B,L]. ReapError for anything else."""
        if isinstance(given, cls):
            return given
        ids = given.get("input_ids") if isinstance(given, Mapping) else None
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise ReapError(
                f"a batch is a {type(given).__name__}: it must be a reap.Batch, or a mapping "
                "with input_ids [rows, length]"
            )
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ReapError(f"the input_ids of a batch are {ids.dtype}: they must be whole numbers")
        mask, counted = given.get("attention_mask"), given.get("counted")
        if mask is None:
            mask = torch.ones_like(ids)
        for name, value in (("attention_mask", mask), ("counted", counted)):
            whole = isinstance(value, Tensor) and value.shape == ids.shape
            if not whole and (name, value) != ("counted", None):
                raise ReapError(
                    f"the {name} of a batch must have the shape of its input_ids, {list(ids.shape)}"
                )
        counted = None if counted is None else counted != 0
        return cls(ids, mask, str(given.get("domain", "default")), counted)


def batches_in(given: Any) -> Iterator[Batch]:
    """The batches that a caller gave. ReapError for what holds none."""
    if not isinstance(given, Iterable):
        raise ReapError(
            f"batches is a {type(given).__name__}: it must be reap.batches(...), a DataLoader or a "
            "list of batches"
        )
    return (Batch.of(one) for one in given)


def check_ids(model: Any, batch: Batch) -> None:
    """ReapError for a token that `model` does not embed: a GPU would not even name it."""
    known = model.get_input_embeddings().weight.shape[0]
    largest = int(batch.input_ids.max()) if batch.input_ids.numel() else 0
    if largest >= known:
        raise ReapError(
            f"token id {largest} in domain {batch.domain!r}, but the model embeds {known} ids: "
            "use the model's own tokenizer"
        )


def batches(
    specs: Spec | Sequence[Spec],
    tokenizer: Any,
    *,
    seq_len: int = 2048,
    batch_size: int = 1,
    max_tokens: int | None = None,
    max_tokens_per_source: int | None = None,
    packing: bool = True,
    seed: int = 0,
    domain: str | None = None,
    skip_bad: bool = False,
    count: str = ALL,
    count_after: str | None = None,
    count_until: str | None = None,
    shard: Share | str | None = None,
) -> Batches:
    """Batches over the specs' text, once, as `Batches` describes. `domain` replaces the names that
    the specs give to theirs. Of a `shard`, "0/8" to "7/8" say, come its share of the batches alone:
    statistics of all shards add up to those of one run.

    All tokens run. Which of them go into the statistics: all; with `count_after` those of every
    document (row, file) that follow the first place where it has this text, `</think>` say, and
    with `count_until` after every such place until behind the next one with that text; with
    `count="assistant"` those of conversations that the chat template marks as the assistant's
    ({% generation %}). A token counts or not: statistics are counts and exact sums of tokens, for
    which other weights have no meaning. The end-of-text token of packing goes with what it ends.

    Specs are checked here, before any text is read. ReapError for a bad
    spec or option, for text that two specs name and for a tokenizer that makes nothing of text or
    cannot tell what counts, and later for text that cannot be read, or of which nothing counts;
    with `skip_bad` bad rows and files are left out and counted."""
    if isinstance(specs, str | PathLike | Source):
        specs = [specs]
    if not specs:
        raise ReapError("no data: give at least one source, for example stdlib:code")
    limits = {"seq_len": seq_len, "batch_size": batch_size, "max_tokens": max_tokens}
    limits["max_tokens_per_source"] = max_tokens_per_source
    for name, value in limits.items():
        if value is None:
            continue
        if not hasattr(value, "__index__") or value < 1:  # 2e6 would fail only when it is reached
            raise ReapError(f"{name} is {value!r}: it has to be a whole number of at least 1")
    sources = [spec if isinstance(spec, Source) else parse_spec(fspath(spec)) for spec in specs]
    if domain is not None:
        sources = [replace(source, domain=domain) for source in sources]
    for source in sources:
        if not source.domain:
            raise ReapError(f"data {source.spec!r}: its domain is empty: give it a name by domain")
    for source in sources:
        if source.kind == "hub":
            require_datasets(source)
    check_distinct(sources, seed)
    if not callable(tokenizer):
        raise ReapError(
            f"tokenizer is a {type(tokenizer).__name__}: it must be the model's tokenizer, for "
            "example of AutoTokenizer.from_pretrained(folder)"
        )
    check_tokenizer(tokenizer)
    counting = Counting.of(count, count_after, count_until, tokenizer)
    packer = Packer(tokenizer, seq_len, packing, counting)
    special = tuple(special_ids(tokenizer))
    seen: set[bytes] = set()
    streams = []
    for source in sources:
        tally = Tally(skip_bad, seen, assistant=counting.count == ASSISTANT)
        rows = packer.rows(read(source, tokenizer, seed, tally), tally)
        streams.append(_Stream(source, rows, tally, max_tokens_per_source, special))
    share = Share.parse(shard) if isinstance(shard, str) else shard or Share()
    return Batches(streams, packer, batch_size, max_tokens, max_tokens_per_source, seed, share)


class Batches(Iterator[Batch]):
    """Iterates once. `max_tokens` is met exactly by cutting the last row, where there is enough
    text; a source that runs out, or has given `max_tokens_per_source`, leaves its share to the
    others, and `describe` says how many tokens each of them gave. The same arguments give the same
    batches.

    A share hands out some of the batches, and passes the others by: what is said of batches that
    were handed out, and all limits, are of both. `position`: how many these are so far. At `until`
    of them the iteration pauses; a later one goes on."""

    def __init__(
        self,
        streams: list[_Stream],
        packer: Packer,
        batch_size: int,
        max_tokens: int | None,
        max_tokens_per_source: int | None,
        seed: int,
        share: Share,
    ) -> None:
        self.position = 0
        self.until: int | None = None
        self._share = share
        self._streams = streams
        self._open = list(streams)
        self._packer = packer
        self._batch_size = batch_size
        self._max_tokens = max_tokens
        self._max_tokens_per_source = max_tokens_per_source
        self._seed = seed
        self._ahead: deque[tuple[_Stream, list[HeldRow]]] = deque()  # read and not handed out

    @property
    def tokens(self) -> int:
        """Unpadded tokens handed out so far."""
        return sum(stream.tokens for stream in self._streams)

    @property
    def counted(self) -> int:
        """Those of them that count."""
        return sum(stream.counted for stream in self._streams)

    @property
    def expected(self) -> int | None:
        """Unpadded tokens that there will be, judged by those of the text read so far; None while
        that cannot be told: before the first batch, and for pipes and the hub."""
        bounds = [] if self._max_tokens is None else [self._max_tokens]
        total = sum(stream.expected for stream in self._streams)
        if not math.isnan(total):
            bounds.append(round(total))
        return min(bounds, default=None)

    @property
    def expected_here(self) -> int | None:
        """Those of `expected` that are this share's, about."""
        return None if self.expected is None else round(self.expected / self._share.of)

    def read_ahead(
        self, progress: Callable[[int], None] | None = None, limit: int = READ_AHEAD
    ) -> bool:
        """Read what will be handed out, up to `limit` tokens, and hold it: what is wrong with the
        text shows now. False when there is more. `progress` is called with tokens as they come."""
        while sum(stream.read for stream in self._streams) - self.tokens < limit:
            found = self._take()
            if found is None:
                return True
            self._ahead.append(found)
            if progress is not None:
                progress(sum(len(row.ids) for row in found[1]))
        return False

    def beginning(self) -> str:
        """Hex SHA-256 of what was read ahead: of all shares the same."""
        digest = hashlib.sha256()
        for stream, rows in self._ahead:
            digest.update(f"{self._streams.index(stream)}, {len(rows)} rows".encode())
            for row in rows:
                digest.update(row.encoded())
        return digest.hexdigest()

    def __next__(self) -> Batch:
        while self.position != self.until:
            found = self._ahead.popleft() if self._ahead else self._take()
            if found is None:
                break
            stream, rows = found
            stream.hand_out(rows)
            self.position += 1
            if self._share.has(self.position - 1):
                ids, mask, counted = self._packer.pad(rows)
                return Batch(ids, mask, stream.source.domain, counted)
        raise StopIteration

    def _take(self) -> tuple[_Stream, list[HeldRow]] | None:
        """The next batch's rows, and where they are from. ReapError when a source has ended without
        a token that counts."""
        read = sum(stream.read for stream in self._streams)
        left = None if self._max_tokens is None else self._max_tokens - read
        while self._open and left != 0:
            stream = min(self._open, key=lambda stream: stream.read / stream.source.weight)
            rows = stream.take(self._batch_size, left)
            if rows:
                return stream, rows
            self._open.remove(stream)
            self._check_counts(stream)
        for stream in self._streams:
            self._check_counts(stream)
        return None

    def _check_counts(self, stream: _Stream) -> None:
        counting = self._packer.counting
        if counting.restricted and stream.read and not stream.counts:
            what = said(counting.describe())
            raise ReapError(
                f"data {stream.source.spec!r}: of its {stream.read:,} tokens none counts, which "
                f"are to be {what}: correct that, take more of it or leave it out"
            )

    def describe(self) -> dict[str, Any]:
        """What was read so far, as JSON: the options, all tokens, and per source its spec, rows,
        tokens and the sha256 over the tokens handed out (per row its length, then its ids, int32
        little endian, then, where not all count, per token whether it does), and how many of its
        rows were empty, bad (and left out), repeated, without place for their tools or without
        tokens that count. Complete once the iteration has ended; then a shard's differs from that
        of the whole in its "shard" alone."""
        counting = self._packer.counting
        counted = {"counted": self.counted} if counting.restricted else {}
        return {
            "seq_len": self._packer.seq_len,
            "batch_size": self._batch_size,
            "packing": self._packer.packing,
            "max_tokens": self._max_tokens,
            "max_tokens_per_source": self._max_tokens_per_source,
            "seed": self._seed,
            "count": counting.describe(),
            "tokens": self.tokens,
            **counted,
            "sources": [stream.describe() for stream in self._streams],
            **self._share.describe(),
        }

    def notes(self) -> list[str]:
        """How many tokens count, where not all do, and a line per source whose rows were not all
        used once, as far as it has been read."""
        counting = self._packer.counting
        ran = f"{self.tokens:,} tokens ran, {self.counted:,} of them count: "
        ran = ran if self._share.of == 1 else f"in all {self._share.of} shards {ran}"
        return [ran + said(counting.describe())] * counting.restricted + [
            f"{stream.source.spec}: {'; '.join(stream.tally.lines())}"
            for stream in self._streams
            if stream.tally.lines()
        ]


@dataclass(eq=False)
class _Stream:
    source: Source
    rows: Iterator[Row]
    tally: Tally
    cap: int | None = None  # tokens
    special: tuple[int, ...] = ()  # ids that no text has of its own
    plain: int = 0  # tokens that are none of these
    read: int = 0  # tokens, of which `tokens` in `row_count` rows were handed out
    counts: int = 0  # of those read, and of those handed out
    counted: int = 0
    tokens: int = 0
    row_count: int = 0
    share: float = math.nan
    digest: Any = field(default_factory=hashlib.sha256)

    @property
    def expected(self) -> float:
        """Tokens of the whole source, if the rest is like what was read; NaN if it is unknown."""
        total = self.read / self.share if self.share else math.nan
        return total if self.cap is None or math.isnan(total) else min(total, self.cap)

    def take(self, count: int, budget: int | None) -> list[HeldRow]:
        """Up to `count` rows of at most `budget` tokens together; none when the source has ended,
        which is a ReapError if it never gave any."""
        if self.cap is not None:
            left = self.cap - self.read
            budget = left if budget is None else min(left, budget)
        rows: list[HeldRow] = []
        while len(rows) < count and budget != 0:
            ids, self.share, counted = next(self.rows, Row([], 1.0))
            if not ids:
                break
            ids = ids[:budget]
            budget = None if budget is None else budget - len(ids)
            marks = None if counted is None else np.array(counted[: len(ids)], bool)
            rows.append(HeldRow(np.array(ids, "<i4"), marks))
            self.read += len(ids)
            self.counts += len(ids) if marks is None else int(marks.sum())
            self.plain += len(ids) - int(np.isin(rows[-1].ids, self.special).sum())
        if not self.read:
            why = "".join(f": {line}" for line in self.tally.lines())
            raise ReapError(f"data {self.source.spec!r} holds no text{why}")
        if not self.plain and (len(rows) < count or self.read >= _SEEN_ENOUGH):
            raise ReapError(
                f"data {self.source.spec!r} holds no text: its first {self.read:,} tokens are all "
                "special or unknown to the tokenizer"
            )
        return rows

    def hand_out(self, rows: list[HeldRow]) -> None:
        for row in rows:
            self.tokens += len(row.ids)
            self.counted += len(row.ids) if row.counted is None else int(row.counted.sum())
            self.row_count += 1
            self.digest.update(row.encoded())

    def describe(self) -> dict[str, Any]:
        """The source's part of `Batches.describe`; the standard library's with its version."""
        described = asdict(self.source)
        if self.source.kind == "stdlib":
            described["python"] = platform.python_version()
        return described | {
            "rows": self.row_count,
            "tokens": self.tokens,
            "counted": self.counted,
            "sha256": self.digest.hexdigest(),
            **self.tally.counts(),
        }
