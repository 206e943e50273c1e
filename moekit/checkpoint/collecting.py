"""A pause of Python's garbage collector, which would scan many thousands of new objects again and again, although all are kept."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    """In this block, and in functions that it decorates, nothing is collected, unless nothing was before."""
    collects = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if collects:
            gc.enable()
