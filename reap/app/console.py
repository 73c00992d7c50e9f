"""What every command shares: results, progress bars, and errors as exit codes."""

import errno
import functools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TypeVar

import typer
from typer.core import TyperGroup

from reap.errors import INTERRUPTED, ReapError, die_of
from reap.report.wording import plain

USER_ERROR, OUR_ERROR = 2, 1
SHOW_AFTER_SECONDS = 2.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)

# What the library advises to pass; anything else like them may be part of a file's name.
ARGUMENTS = (
    "allow_copy|keep|multiple_of|new_tokens|overwrite|prompt_tokens|ratio|scope|trust_remote_code"
)
# What it speaks of without a value.
NAMES = (
    "batch_size|count_after|count_until|min_per_layer|seq_len|task_path|until_stable|wave_tokens"
)

Command = TypeVar("Command", bound=Callable[..., None])
RANKED = ("calibrate",)  # commands that can be started as several processes for one run

debug = False
quiet = False  # this process is one of several, and another one talks
_interrupted: int | None = None  # the signal
_printed = False  # a JSON document


def reports_errors(command: Command) -> Command:
    """One line on stderr and an exit code: 2 the user, 1 ours. A signal ends the program as if it
    had not been caught.

    `--debug` shows the traceback. With `--json` stdout has one document in any case, `{"error":
    line}` here.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        global _interrupted, _printed, quiet
        _interrupted, _printed, quiet = None, False, False
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in before.items():
            if handler in (signal.default_int_handler, signal.SIG_DFL):
                signal.signal(number, _interrupt)
        try:
            if "WORLD_SIZE" in os.environ and command.__name__ not in RANKED:
                from reap.runs.ranks import refuse_ranks

                refuse_ranks(f"reap {command.__name__}")
            command(*args, **kwargs)
            _stop_if_interrupted()
            sys.stdout.flush()  # here, where a full disk can still be told
        except (typer.Exit, BrokenPipeError):  # the latter ends quietly: nobody reads on
            raise
        except (Exception, KeyboardInterrupt) as error:
            if debug and not _is_interrupt(error):
                raise
            code, line = _explain(error)
            line = "; ".join([line, *getattr(error, "__notes__", ())])
            line = as_flags(" ".join(line.split()))
            if not quiet:
                say(line)
            if kwargs.get("json") and not _printed and not quiet:
                _print_error(line)
            if _is_interrupt(error):
                die_of(_interrupted or signal.SIGINT)
            raise typer.Exit(code) from None
        finally:
            for number, handler in before.items():
                if handler is not None:  # not Python's
                    signal.signal(number, handler)

    return run  # type: ignore[return-value]


class Commands(TyperGroup):
    """The commands. What goes wrong outside of one, in the command line or in printing help, is
    reported like what goes wrong in it."""

    def main(self, args: Any = None, *more: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        run = functools.partial(super().main, given, *more, **extra)
        if not standalone_mode:
            return run(standalone_mode=False)
        try:
            code = run(standalone_mode=False)
        except OSError as error:
            code, line = _explain(error)
            say(line)
        except Exception as error:
            usage: Any = error  # click's, which some releases of typer bring themselves
            if not hasattr(usage, "format_message"):
                raise
            code = usage.exit_code
            with suppress(OSError):
                usage.show()
            if "--json" in given:
                _print_error(usage.format_message())
        sys.exit(code)


def say(line: str) -> None:
    """A line on stderr. That nobody can read it is no reason to end."""
    with suppress(OSError):
        typer.echo(f"reap: {legible(line)}", err=True)


def legible(text: str) -> str:
    """`text` on one line, without what would move a cursor or turn letters round."""
    return text if text.isprintable() else plain(text, len(text))


@contextmanager
def silence() -> Iterator[None]:
    """Nothing goes to stdout and stderr of what Python code prints there."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def as_flags(text: str) -> str:
    """What the library says of its arguments, of the options of the command line."""

    def flag(match: re.Match[str]) -> str:
        value = "" if match[2] in ("", "True") else " " + match[2].strip('"')
        return f"--{match[1].replace('_', '-')}{value}"

    with_value = rf'({ARGUMENTS})=(True|[\d.]+\b|"[a-z]+")'
    for pattern in (with_value, f"({NAMES})()"):
        text = re.sub(rf"(?<![^ ]){pattern}(?![^ ;,:])", flag, text)
    return text


def _interrupt(number: int, _: object) -> None:
    """Ctrl-C, a scheduler's end of time, a lost terminal.

    Importing torch swallows a KeyboardInterrupt now and then: `progress` asks again.
    """
    global _interrupted
    _interrupted = number
    raise KeyboardInterrupt


def _is_interrupt(error: BaseException) -> bool:
    return isinstance(error, KeyboardInterrupt) or _interrupted is not None


def _explain(error: BaseException) -> tuple[int, str]:
    if _is_interrupt(error):  # an import may turn it into its own
        return USER_ERROR, INTERRUPTED
    if isinstance(error, ReapError):
        return USER_ERROR, str(error)
    kind = type(error).__name__
    if kind in ("MemoryError", "OutOfMemoryError"):  # the latter is torch's, for a GPU
        return USER_ERROR, f"out of memory ({error}): smaller --batch-size, --seq-len need less"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return USER_ERROR, f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in FULL:  # files are written with their names
        _give_up_stdout()
        return USER_ERROR, f"cannot write to stdout: {error.strerror}"
    return OUR_ERROR, f"internal error: {kind}: {error} (`reap --debug` shows where)"


def _give_up_stdout() -> None:
    """Without this Python would try to print what is left at its end, and complain."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _stop_if_interrupted() -> None:
    if _interrupted is not None:
        raise KeyboardInterrupt


def print_json(result: object) -> None:
    """The one machine-readable form: a JSON document in ASCII on stdout, NaN as null."""
    global _printed
    typer.echo(json.dumps(_without_nan(result), indent=2, allow_nan=False))
    _printed = True


def _print_error(line: str) -> None:
    try:
        print_json({"error": " ".join(line.split())})
    except OSError:  # which the error may have been of
        _give_up_stdout()


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and value - value != 0.0:
        return None
    return value


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table; the first column is text, the others are numbers.

    As wide as its figures need and no wider: a narrow terminal wraps a line, which loses less than
    an ellipsis. (rich would take a millisecond per row, of which there may be one per expert.)
    """
    from rich.cells import cell_len

    lines = [columns, *([legible(cell) for cell in row] for row in rows)]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    shown = [title]
    for first, *others in lines:
        parts = [first + " " * (widths[0] - cell_len(first))]
        for text, width in zip(others, widths[1:], strict=True):
            parts.append(" " * (width - cell_len(text)) + text)
        shown.append("  ".join(parts).rstrip())
    print("\n".join(shown))  # typer's echo writes UTF-8 where the terminal has something else


@contextmanager
def progress(
    task: str, total: Callable[[], int | None], unit: str
) -> Iterator[Callable[[int], None]]:
    """Yield `advance(n)`: a bar with rate and time left on stderr, once two seconds have passed.

    `total` is asked anew at every step: an estimate may get better. Quiet where stderr is not a
    terminal.
    """
    if not sys.stderr.isatty():
        yield lambda amount: _stop_if_interrupted()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    job = bar.add_task(task, total=None, rate="")
    start, done = time.monotonic(), 0

    def advance(amount: int) -> None:
        nonlocal done
        _stop_if_interrupted()
        done += amount
        elapsed = time.monotonic() - start
        if elapsed > SHOW_AFTER_SECONDS:
            bar.start()
        rate = f"{done / max(elapsed, 1e-9):,.0f} {unit}/s"
        bar.update(job, rate=rate)
        end = total()
        if end:  # in shares of the whole: a new total would make the bar forget its speed
            bar.update(job, completed=min(1.0, done / end), total=1.0)

    try:
        yield advance
    finally:
        bar.stop()
