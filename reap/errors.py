"""The one exception for mistakes that the user can mend, and what it says of others."""

INTERRUPTED = "interrupted: no half-written output was left"


class ReapError(ValueError):
    """What is wrong, with what, and what to do: one line, shown without a traceback."""


def first_line(error: BaseException) -> str:
    """The part of another library's error that fits into one of ours."""
    return (str(error).strip().splitlines() or [""])[0] or type(error).__name__
