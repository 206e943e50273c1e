"""Measurements of time, of memory, and of the ceilings of a device."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moekit.units import GIB
from moekit.worker.measuring import Ceilings, ceilings, median, seconds, slowest, synchronise

__all__ = [
    "Ceilings",
    "Peak",
    "ceilings",
    "give_back",
    "host_bytes",
    "median",
    "memory",
    "seconds",
    "slowest",
    "synchronise",
]


@dataclass
class Peak:
    """Peak memory of this process, filled in at the end of :func:`memory`."""

    gpu_gib: float | None = None
    host_gib: float | None = None


@contextlib.contextmanager
def memory(device: torch.device) -> Iterator[Peak]:
    """Measure peak memory: torch's allocations on the GPU; on the host, memory without mapped files, 50 times per second."""
    peak, done = Peak(), threading.Event()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def watch() -> None:
        over = False
        while not over:
            over = done.wait(0.02)
            now = host_bytes()
            if now is not None:
                peak.host_gib = max(peak.host_gib or 0.0, now / GIB)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        if device.type == "cuda":
            peak.gpu_gib = torch.cuda.max_memory_allocated(device) / GIB


def host_bytes() -> int | None:
    """The memory of this process without mapped files; None on systems without /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = dict(line.split(":", 1) for line in lines)
    return 1024 * sum(int(found[name].split()[0]) for name in ("RssAnon", "RssShmem"))


def give_back(device: torch.device | str) -> None:
    """Free unused memory, so that other processes can allocate it."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
