"""Threads that work on tensors, each with one core: torch's own threads would contend for the cores with them."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

THREADS = min(8, os.cpu_count() or 1)


@contextlib.contextmanager
def pool(name: str, threads: int = THREADS) -> Iterator[ThreadPoolExecutor]:
    """An executor of ``threads`` threads called ``name``."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, name, torch.set_num_threads, (1,)) as executor:
            yield executor
    finally:
        # A thread of torch's takes over the number that was set last, in whichever thread.
        torch.set_num_threads(before)


_lock = threading.Lock()
# Blocks in force, over all threads, and the interval before the first of them.
_blocks, _before = 0, 0.0


@contextlib.contextmanager
def switching(seconds: float) -> Iterator[None]:
    """In this block, a thread that computes in Python gives Python's lock to one that waits for it after ``seconds``, not 5 ms.

    A thread that copies needs the lock for microseconds between two copies of milliseconds.
    """
    global _blocks, _before
    counted = False
    try:
        with _lock:
            _blocks, counted = _blocks + 1, True
            if _blocks == 1:
                _before = sys.getswitchinterval()
                sys.setswitchinterval(min(_before, seconds))
        yield
    finally:
        with _lock:
            _blocks -= counted
            if _blocks == 0:
                sys.setswitchinterval(_before or sys.getswitchinterval())
