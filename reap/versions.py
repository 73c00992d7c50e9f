"""The version of this package, and which versions of others are installed and tested."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

OWN = "0.1.0"
# Oldest and newest release that the tests run with. The lower bound in pyproject.toml and the pins
# in constraints.txt agree with these, and the Makefile reads them here.
TESTED = {"transformers": ("5.7.0", "5.24.0"), "torch": ("2.13.0", "2.13.0")}


def releases(package: str) -> str:
    """The releases of `package` in TESTED, as a sentence has them."""
    return " to ".join(dict.fromkeys(TESTED[package]))


def installed(*packages: str) -> dict[str, str | None]:
    """The versions of these packages; None for one that is not installed."""
    return {package: _installed(package) for package in packages}


@cache
def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
