"""Threads that work on tensors, each with one core: torch's own threads would contend for the cores with them."""

from __future__ import annotations

import contextlib
import os
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
