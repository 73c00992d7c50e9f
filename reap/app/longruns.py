"""What a long run says of itself where no bar is seen: a log of a scheduler, say."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from reap.app.console import progress

EVERY_SECONDS = 60.0
LONG = 100_000  # tokens, from which a run says what it is


def announce(what: str, tokens: int | None, quiet: bool) -> None:
    """A line on stderr before a run that is long, or may be."""
    if not quiet and (tokens is None or tokens >= LONG):
        about = "of unknown length" if tokens is None else f"about {tokens:,} tokens"
        typer.echo(f"reap: {what}, {about}", err=True)


@contextmanager
def reported(
    task: str, total: Callable[[], int | None], unit: str, quiet: bool = False
) -> Iterator[Callable[[int], None]]:
    """`progress`, and where stderr is no terminal a line per minute instead of its bar."""
    start, done, said = time.monotonic(), 0, time.monotonic()
    lines = not quiet and not sys.stderr.isatty()
    with progress(task, total, unit) as advance:

        def step(amount: int) -> None:
            nonlocal done, said
            advance(amount)
            done += amount
            now = time.monotonic()
            if lines and now - said >= EVERY_SECONDS:
                said = now
                typer.echo(f"reap: {_line(task, done, total(), unit, now - start)}", err=True)

        yield step


def _line(task: str, done: int, total: int | None, unit: str, seconds: float) -> str:
    rate = done / max(seconds, 1e-9)
    of = "" if total is None else f" of about {total:,}"
    left = ""
    if total is not None and rate:
        left = f", {max(0.0, total - done) / rate / 60:,.0f} min left"
    return f"{task}: {done:,}{of} {unit}, {rate:,.0f} {unit}/s{left}"
