"""The version of this package, and which versions of others it needs, is tested with and finds
installed."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

OWN = "0.1.0"
# Oldest and newest release that the tests run with. The lower bound in pyproject.toml and the pins
# in constraints.txt agree with these, and the Makefile reads them here.
TESTED = {"transformers": ("5.7.0", "5.24.0"), "torch": ("2.13.0", "2.13.0")}
# The oldest of each that can work, and why it is no older.
LOWEST = {
    "python": ("3.10", "the oldest that transformers has"),
    "transformers": ("5.7.0", "the first that looks the experts' kernels up in its registry"),
    "torch": ("2.7", "torch.float8_e8m0fnu, a dtype that checkpoints have"),
    "triton": ("3.4", "triton.knobs; torch for GPUs brings the triton it works with, 2.8 this one"),
}
# From which release of transformers on a type of model can be observed; the others always.
SINCE = {"granitemoe": "5.13.0", "dbrx": "5.15.0", "aria": "5.18.0"}


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
