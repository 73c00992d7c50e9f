"""The one exception for mistakes that the user can mend, what it says of others, and how a signal
ends this program."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

INTERRUPTED = "interrupted: no half-written output was left"


class ReapError(ValueError):
    """What is wrong, with what, and what to do: one line, shown without a traceback."""


def first_line(error: BaseException) -> str:
    """The part of another library's error that fits into one of ours: its first line, and where
    that only announces it, what it announces."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    count = next((i for i, line in enumerate(lines, 1) if not line.endswith(":")), len(lines))
    return " ".join(lines[:count]).rstrip(":")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Signals that would raise an exception here wait for the end of the `with`, and so for no
    longer than what is in it takes."""
    if threading.current_thread() is not threading.main_thread():  # where none does
        yield
        return
    waiting: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: waiting.append(number))
        for number in signal.valid_signals()
        if callable(signal.getsignal(number))
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in waiting[:1]:
            signal.raise_signal(late)


def die_of(number: int) -> NoReturn:
    """Ends this process the way that the signal does by itself: a shell ends its loop, which goes
    on after any exit code."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    raise SystemExit(128 + number)  # it is blocked
