"""The version of this package, and which versions of others are installed."""

from importlib.metadata import PackageNotFoundError, version

OWN = "0.1.0"


def installed(*packages: str) -> dict[str, str | None]:
    """The versions of these packages; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
