"""Hold the interrupt key back while something must not stop half-way."""

from __future__ import annotations

import contextlib
import importlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def hold_interrupts() -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Note an interrupt in this block and deliver it at the block's end.

    An import that is cut in the middle leaves registries half-filled, and no later import mends them. Python delivers
    interrupts to the main thread alone, so in other threads this does nothing.

    Yields:
        A block within this one, in which interrupts come as before: its ``with`` is the last one of several, so that those before it
        begin and end whole.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield contextlib.nullcontext
        return
    noted = []

    def note(*_: object) -> None:
        noted.append(True)

    def deliver() -> None:
        signal.signal(signal.SIGINT, before)
        if noted:
            noted.clear()
            signal.raise_signal(signal.SIGINT)

    @contextlib.contextmanager
    def as_before() -> Iterator[None]:
        nonlocal before
        try:
            deliver()
            yield
        finally:
            before = signal.signal(signal.SIGINT, note)

    signal.signal(signal.SIGINT, note)
    try:
        yield as_before
    finally:
        deliver()


def import_whole(*names: str) -> None:
    """Import modules that are imported when they are needed, and not by half: many cannot be imported again then."""
    with hold_interrupts():
        for name in names:
            importlib.import_module(name)
