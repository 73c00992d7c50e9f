"""`python -m reap` and the `reap` command."""

import signal
import sys

from reap.errors import INTERRUPTED, die_of


def main() -> None:
    # Commands explain themselves; this is for a Ctrl-C while they are still being imported.
    try:
        from reap.app.cli import app
        from reap.app.console import print_error_unless_printed

        app(prog_name="reap")
    except SystemExit as end:
        # A command line that is not understood: no command was there to print a document.
        if end.code == 2 and "--json" in sys.argv[1:]:
            print_error_unless_printed()
        raise
    except KeyboardInterrupt:
        sys.stderr.write(f"reap: {INTERRUPTED}\n")
        die_of(signal.SIGINT)


if __name__ == "__main__":
    main()
