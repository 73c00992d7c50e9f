"""`python -m reap` and the `reap` command."""

from reap.cli import app


def main() -> None:
    app(prog_name="reap")


if __name__ == "__main__":
    main()
