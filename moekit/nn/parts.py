"""Names for the parts of a pass, as ranges that a profiler records; nothing happens while no profiler looks.

    with part("attention"):
        ...

A range lies in that of its layer, which lies in that of its step. The kernels that the host launches within a range
belong to it. A replayed CUDA graph has no ranges: moekit/profiling/naming.py names its kernels by their order.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

# The range of copies of experts to the device; the number of bytes follows.
FETCH = "fetch"
# The range of a decode step that is one kernel.
WHOLE = "whole step"
P, R = ParamSpec("P"), TypeVar("R")
PREFIX = "moekit: "
NOTHING = contextlib.nullcontext()
# Whether the ranges are recorded. A list, so that the functions below see it change.
_shown = [False]


def part(name: str) -> contextlib.AbstractContextManager:
    """The range of the part called ``name``; it does nothing outside of :func:`shown`."""
    return torch.profiler.record_function(PREFIX + name) if _shown[0] else NOTHING


def is_part(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: every call of the function is in the range of the part called ``name``."""

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            if not _shown[0]:
                return function(*args, **kwargs)
            with part(name):
                return function(*args, **kwargs)

        return called

    return decorated


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Record the ranges in the ``with`` block."""
    _shown[0] = True
    try:
        yield
    finally:
        _shown[0] = False
