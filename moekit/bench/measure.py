"""Clocks, memory and the chip's ceilings."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moekit.bench.figures import GIB
from moekit.ranks import Rank


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(
    work: Callable[[], object],
    device: torch.device,
    *,
    repeats: int,
    warm_up: int = 2,
    least: float = 0.0,
) -> list[float]:
    """What ``work`` takes, ``repeats`` times, each until the device is done.

    Args:
        warm_up: calls before, which do not count: they compile, capture graphs and fill caches.
        least: seconds that a measurement takes at least; what is shorter is called several times on end. 0 where
            ranks have to call alike.
    """
    for _ in range(warm_up):
        work()

    def timed(calls: int) -> float:
        synchronise(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronise(device)
        return (time.perf_counter() - start) / calls

    calls = max(1, math.ceil(least / timed(1))) if least else 1
    return [timed(calls) for _ in range(repeats)]


def median(work: Callable[[], object], device: torch.device, **how: float) -> float:
    return statistics.median(seconds(work, device, **how))


@dataclass
class Peak:
    """Peak memory of this process, filled in at the end of :func:`memory`."""

    gpu_gib: float | None = None
    host_gib: float | None = None


@contextlib.contextmanager
def memory(device: torch.device) -> Iterator[Peak]:
    """Watch memory: on the GPU what torch allocates; on the host what is not a mapped file, 50 times a second."""
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
    """Memory of this process beyond the files it maps; None on systems without /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = dict(line.split(":", 1) for line in lines)
    return 1024 * sum(int(found[name].split()[0]) for name in ("RssAnon", "RssShmem"))


@dataclass(frozen=True)
class Ceilings:
    """What a device does at best, the slowest rank's figures.

    Attributes:
        copy: bytes a second, read and written ones both counted, while it copies its own memory.
        matmul: floating-point operations a second of a large square product in the dtype asked for.
        fetch: bytes a second from pinned host memory; on the CPU, those read while it copies.
        device: its name.
    """

    copy: float
    matmul: float
    fetch: float
    device: str

    def seconds(self, bytes_read: float, flop: float) -> float:
        """The least that a work can take that reads so much and computes so much."""
        return max(bytes_read / self.copy, flop / self.matmul)


@torch.inference_mode()
def ceilings(rank: Rank, dtype: torch.dtype) -> Ceilings:
    """Measure this rank's; all ranks at the same time."""
    device = rank.device
    on_gpu = device.type == "cuda"
    how = {"repeats": 5, "least": 0.02}
    size = GIB if on_gpu else 64 << 20
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * size / median(lambda: target.copy_(source), device, **how)
    fetch = copy / 2
    if on_gpu:
        pinned = torch.ones(size // 4, dtype=torch.uint8, pin_memory=True)
        part = target[: len(pinned)]
        fetch = len(pinned) / median(lambda: part.copy_(pinned, non_blocking=True), device, **how)
    n = 8192 if on_gpu else 1024
    a, b = (torch.rand(n, n, device=device).to(dtype) for _ in range(2))
    product = torch.empty(n, n, device=device, dtype=dtype)
    matmul = 2 * n**3 / median(lambda: torch.mm(a, b, out=product), device, **how)
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    return Ceilings(copy, matmul, fetch, name)


def slowest(found: list[Ceilings]) -> Ceilings:
    first = found[0]
    best = {name: min(getattr(c, name) for c in found) for name in ("copy", "matmul", "fetch")}
    return Ceilings(**best, device=first.device if len(found) == 1 else f"{len(found)} x {first.device}")


def give_back(device: torch.device | str) -> None:
    """Free what nothing refers to any more, so that others find the room."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
