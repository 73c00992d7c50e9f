"""A first call that compiles says so, once, if it takes long enough to be wondered at."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import triton

PATIENCE = 1.0  # seconds

log = logging.getLogger("reap_kernels")
_said = threading.Event()


@contextmanager
def announced() -> Iterator[None]:
    """Kernels are launched inside that may have to be compiled first."""
    if _said.is_set() or triton.knobs.runtime.interpret:
        yield
        return
    target = triton.runtime.driver.active.get_current_target()
    timer = threading.Timer(PATIENCE, _say, [target.backend, target.arch])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(backend: str, arch: int | str) -> None:
    if _said.is_set():
        return
    _said.set()
    log.warning(
        "compiling Triton kernels for %s: about 10 s for each kind of layer, the first time; "
        "later they come from %s",
        f"sm_{arch}" if backend == "cuda" else arch,
        triton.knobs.cache.dir,
    )
