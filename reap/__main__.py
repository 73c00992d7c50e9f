"""`python -m reap` and the `reap` command."""

import sys

from reap.errors import INTERRUPTED


def main() -> None:
    # Commands explain themselves; this is for a Ctrl-C while they are still being imported.
    try:
        from reap.app.cli import app

        app(prog_name="reap")
    except KeyboardInterrupt:
        sys.stderr.write(f"reap: {INTERRUPTED}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
