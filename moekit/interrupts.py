"""Hold the interrupt key back while something must not stop half-way."""

from __future__ import annotations

import contextlib
import importlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def hold_interrupts() -> Iterator[None]:
    """Note an interrupt in this block and deliver it at the block's end.

    An import that is cut in the middle leaves registries half-filled, and no later import mends them. Python delivers
    interrupts to the main thread alone, so in other threads this does nothing.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    noted = []
    signal.signal(signal.SIGINT, lambda *_: noted.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if noted:
            signal.raise_signal(signal.SIGINT)


def import_whole(*names: str) -> None:
    """Import modules that are imported when they are needed, and not by half: many cannot be imported again then."""
    with hold_interrupts():
        for name in names:
            importlib.import_module(name)
