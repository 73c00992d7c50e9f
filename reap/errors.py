"""The one exception for mistakes that the user can mend."""


class ReapError(ValueError):
    """What is wrong, with what, and what to do: one line, shown without a traceback."""
