"""`python -m reap` and the `reap` command."""

import os
import signal
import sys


def main() -> None:
    # Commands explain an interrupt and clean up after it. Before one has begun there is nothing to
    # clean up, and this way nobody makes an exit code of it.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _fill_closed_streams()
    from reap.app.cli import app

    app(prog_name="reap")


def _fill_closed_streams() -> None:
    """Whoever starts this may have closed them, and then the next files to be opened would take
    their numbers. Writing results to what is not there stays an error; talking to it is none."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")


if __name__ == "__main__":
    main()
