"""The version of this package, and which versions of others are installed."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

OWN = "0.1.0"


def installed(*packages: str) -> dict[str, str | None]:
    """The versions of these packages; None for one that is not installed."""
    return {package: _installed(package) for package in packages}


@cache
def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
