"""The one exception for mistakes that the user can mend, what it says of others, and how a signal
ends this program."""

import os
import signal
import sys
from contextlib import suppress
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


def die_of(number: int) -> NoReturn:
    """Ends this process the way that the signal does by itself: a shell ends its loop, which goes
    on after any exit code."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    raise SystemExit(128 + number)  # it is blocked
