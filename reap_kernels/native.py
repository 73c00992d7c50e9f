"""The compiled extension `reap_kernels._native`, or the reason why there is none."""

from importlib import import_module
from types import ModuleType

_native: ModuleType | None = None
try:
    _native = import_module("reap_kernels._native")
except ImportError as error:
    _reason = (
        f"the native extension is not built ({error}): install a C++17 compiler and pybind11, "
        "then run `pip install --no-build-isolation -e .` again and read what it says"
    )


def missing() -> str | None:
    """Why the extension is not there, in one line; None if it is."""
    return None if _native is not None else _reason


def module() -> ModuleType:
    """The extension; ImportError with the reason if it is missing."""
    if _native is None:
        raise ImportError(_reason)
    return _native
