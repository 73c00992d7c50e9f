"""What a long run says of itself: at once what runs where, and where no bar is seen (a log of a
scheduler, say) how far it is."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from reap.app.arguments import LoadOptions, TextOptions
from reap.app.console import progress, say
from reap.files.units import counted, sized

if TYPE_CHECKING:
    from reap.text.batching import Batches
    from reap.text.share import Share
    from reap.text.sources import Source

FIRST_SECONDS, EVERY_SECONDS = 10.0, 60.0
SAMPLE = 1 << 16  # tokens that are read before anything is said
LONG_SECONDS = 10.0


def announce(task: str, *facts: str | None) -> None:
    """The first line of a long run, on stderr."""
    say(f"{task}: {', '.join(filter(None, facts))}")


def where(folder: Path, load: LoadOptions, backend: str | None = None) -> str:
    """In which data type, on which device and by which kernels the model in `folder` will run."""
    import torch

    from reap.files.folder import open_folder
    from reap.model.load import find_device
    from reap.model.unpacked import said_of_folder
    from reap.runs.calibration import backend_said

    dtype, opened = load.dtype, open_folder(folder)
    packed = said_of_folder(opened)
    if packed is not None:
        dtype = packed + ("" if dtype == "auto" else f" to {dtype}")
    elif dtype == "auto":
        stored: Counter[str] = Counter()
        for shard in opened.shards:
            for tensor in shard.tensors.values():
                stored[tensor.dtype] += tensor.nbytes
        dtype = f"{stored.most_common(1)[0][0]} as stored" if stored else "its data type"
    device = find_device(load.device)
    if device.startswith("cuda"):
        device += f" ({torch.cuda.get_device_name(device)})"
    return f"{dtype} on {device}" + (f", backend {backend_said(backend)}" if backend else "")


def verdict(folder: Path, load: LoadOptions, streamed: str | None) -> str:
    """Which way the model in `folder` will run, and why (`why_streamed`)."""
    from reap.model.load import find_device
    from reap.runs import memory
    from reap.runs.mode import whole

    if streamed is not None:
        return f"layer by layer ({streamed})"
    if find_device(load.device) != "cpu":
        return "in memory"
    return f"in memory ({sized(whole(folder, load.dtype))} of {sized(memory.allowed())})"


def shape_of(rows: Batches) -> str:
    """How much text, in which rows."""
    about = rows.describe()
    tokens = (
        "of unknown length" if rows.expected is None else f"about {counted(rows.expected, 'token')}"
    )
    return f"{tokens} in rows of {about['seq_len']:,}, {about['batch_size']} at a time"


def rows_of(
    folder: Path, text: TextOptions, sources: list[Source], trust: bool, share: Share | None = None
) -> Batches:
    """The text as batches for the model in `folder`, the beginning of it read: what is wrong with
    short text shows here."""
    from reap.model.config import row_length
    from reap.model.load import load_tokenizer
    from reap.text.batching import batches

    rows = batches(
        sources,
        load_tokenizer(folder, trust_remote_code=trust),
        seq_len=row_length(folder, text.seq_len, trust_remote_code=trust),
        batch_size=text.batch_size,
        max_tokens=text.max_tokens,
        max_tokens_per_source=text.max_tokens_per_source,
        packing=text.pack,
        domain=text.domain,
        skip_bad=text.skip_bad,
        count=text.count,
        count_after=text.count_after,
        count_until=text.count_until,
        shard=share,
    )
    if _may_be_bad(rows, sources):
        rows.read_ahead(limit=SAMPLE)
    return rows


def read_on(rows: Batches, sources: list[Source]) -> None:
    """Read the rest of the text too, while no model is loaded and nothing is lost by a bad row;
    only of more text than memory should hold not all is. What takes long says so first."""
    from reap.text.batching import READ_AHEAD

    if not _may_be_bad(rows, sources):
        return
    with reported("reading", lambda: rows.expected, "tokens") as advance:
        start = time.monotonic()
        if rows.read_ahead(advance, limit=2 * SAMPLE):
            return
        ahead = min(rows.expected or READ_AHEAD, READ_AHEAD)
        seconds = (time.monotonic() - start) / SAMPLE * ahead
        if seconds > LONG_SECONDS:
            announce("reading", f"about {ahead:,} tokens", f"about {lasting(seconds)}")
        if not rows.read_ahead(advance):
            say("long text: its beginning was checked, not all of it")


def _may_be_bad(rows: Batches, sources: list[Source]) -> bool:
    """Not so the standard library's own text, which is made as it is read and takes long, unless a
    marker is looked for in it."""
    return any(source.kind != "stdlib" for source in sources) or bool(rows.describe()["count"])


@contextmanager
def reported(
    task: str, total: Callable[[], int | None], unit: str
) -> Iterator[Callable[[int], None]]:
    """`progress`, and where stderr is no terminal lines instead of its bar: one when it can be told
    how long this will take, then one per minute."""
    start, done = time.monotonic(), 0
    due = start + FIRST_SECONDS
    lines = not sys.stderr.isatty()
    with progress(task, total, unit) as advance:

        def step(amount: int) -> None:
            nonlocal done, due
            advance(amount)
            done += amount
            now = time.monotonic()
            if lines and now >= due:
                due = now + EVERY_SECONDS
                say(_line(task, done, total(), unit, now - start))

        yield step


def _line(task: str, done: int, total: int | None, unit: str, seconds: float) -> str:
    rate = done / max(seconds, 1e-9)
    of = "" if total is None else f" of about {total:,}"
    left = ""
    if total is not None and rate:
        left = f", {lasting(max(0.0, total - done) / rate)} left"
    return f"{task}: {done:,}{of} {unit}, {rate:,.0f} {unit}/s{left}"


def lasting(seconds: float) -> str:
    for unit, scale in (("h", 3600), ("min", 60)):
        if seconds >= scale * 1.5:
            return f"{seconds / scale:.1f} {unit}"
    return f"{seconds:.0f} s"
