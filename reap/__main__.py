"""`python -m reap` and the `reap` command."""

import signal
import sys


def main() -> None:
    # Commands explain an interrupt and clean up after it. Before one has begun there is nothing to
    # clean up, and this way nobody makes an exit code of it.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from reap.app.cli import app
    from reap.app.console import print_error_unless_printed

    try:
        app(prog_name="reap")
    except SystemExit as end:
        # A command line that is not understood: no command was there to print a document.
        if end.code == 2 and "--json" in sys.argv[1:]:
            print_error_unless_printed()
        raise


if __name__ == "__main__":
    main()
