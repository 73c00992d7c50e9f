"""What every command shares: results, progress bars, and errors as exit codes."""

import functools
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import typer

from reap.errors import ReapError

USER_ERROR, OUR_ERROR = 2, 1
SHOW_AFTER_SECONDS = 2.0

Command = TypeVar("Command", bound=Callable[..., None])
debug = False
_interrupted = False


def reports_errors(command: Command) -> Command:
    """One line on stderr and an exit code: 2 the user (a mistake or Ctrl-C), 1 ours.

    `--debug` shows the traceback.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupt)
        try:
            command(*args, **kwargs)
        except typer.Exit:
            raise
        except (Exception, KeyboardInterrupt) as error:
            if debug:
                raise
            code, line = _explain(error)
            typer.echo("reap: " + " ".join(line.split()), err=True)
            raise typer.Exit(code) from None

    return run  # type: ignore[return-value]


def _interrupt(*_: object) -> None:
    """Ctrl-C. Importing torch swallows a KeyboardInterrupt now and then: `progress` asks again."""
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def _explain(error: BaseException) -> tuple[int, str]:
    if isinstance(error, KeyboardInterrupt):
        return USER_ERROR, "interrupted: no output was written or changed"
    if isinstance(error, ReapError):
        return USER_ERROR, str(error)
    kind = type(error).__name__
    return OUR_ERROR, f"internal error: {kind}: {error} (`reap --debug` shows where)"


def _stop_if_interrupted() -> None:
    if _interrupted:
        raise KeyboardInterrupt


def print_json(result: object) -> None:
    """The one machine-readable form: a JSON document on stdout, NaN as null."""
    typer.echo(json.dumps(_without_nan(result), indent=2, ensure_ascii=False, allow_nan=False))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and value - value != 0.0:
        return None
    return value


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A rich table; the first column is text, the others are numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # A pipe has no width: 80 columns would cut figures out of a log.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@contextmanager
def progress(task: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """Yield `advance(n)`: a bar with rate and time left on stderr, once two seconds have passed.

    Quiet where stderr is not a terminal.
    """
    if not sys.stderr.isatty():
        yield lambda amount: _stop_if_interrupted()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%" if total else ""),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    job = bar.add_task(task, total=total, rate="")
    start, done = time.monotonic(), 0

    def advance(amount: int) -> None:
        nonlocal done
        _stop_if_interrupted()
        done += amount
        elapsed = time.monotonic() - start
        if elapsed > SHOW_AFTER_SECONDS:
            bar.start()
        rate = f"{done / max(elapsed, 1e-9):,.0f} {unit}/s"
        bar.update(job, completed=done, rate=rate)

    try:
        yield advance
    finally:
        bar.stop()
