"""Times of work on a rank, and the ceilings of its device: what the benches and the profiles compare with."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moekit.ranks import Rank
from moekit.units import GIB


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all its work."""
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
    """The seconds of ``work``, measured ``repeats`` times, each time until the work of the device is complete.

    Args:
        warm_up: calls before the measurements, which compile kernels, capture graphs and fill caches.
        least: the least seconds of a measurement; shorter work is called several times in succession. It is 0 if all
            ranks have to make the same number of calls.
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
    """The median of :func:`seconds`, with its arguments."""
    return statistics.median(seconds(work, device, **how))


@dataclass(frozen=True)
class Ceilings:
    """The highest measured rates of a device; with several ranks, those of the slowest rank.

    Attributes:
        copy: bytes per second of a copy in the memory of the device; read and written bytes both count.
        matmul: floating-point operations per second of a large square product in the requested dtype.
        fetch: bytes per second from pinned host memory; on the CPU, the bytes read by a copy.
        device: the name of the device.
    """

    copy: float
    matmul: float
    fetch: float
    device: str

    def seconds(self, bytes_read: float, flop: float) -> float:
        """The least seconds of work that reads ``bytes_read`` bytes and computes ``flop`` operations."""
        return max(bytes_read / self.copy, flop / self.matmul)


@torch.inference_mode()
def ceilings(rank: Rank, dtype: torch.dtype) -> Ceilings:
    """Measure the ceilings of this rank's device; all ranks measure at the same time."""
    device = rank.device
    on_gpu = device.type == "cuda"
    how = {"repeats": 5, "least": 0.02}
    size = GIB if on_gpu else 64 << 20
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * size / min(seconds(lambda: target.copy_(source), device, **how))
    fetch = copy / 2
    if on_gpu:
        pinned = torch.ones(size // 4, dtype=torch.uint8, pin_memory=True)
        part = target[: len(pinned)]
        fetch = len(pinned) / min(seconds(lambda: part.copy_(pinned, non_blocking=True), device, **how))
    n = 8192 if on_gpu else 1024
    # A profile leaves a notebook's own draws as they are.
    drawn = torch.Generator(device).manual_seed(1)
    a, b = (torch.rand(n, n, device=device, generator=drawn).to(dtype) for _ in range(2))
    product = torch.empty(n, n, device=device, dtype=dtype)
    # The second matrix lies as a layer's weights do. Where a CPU has no instructions for float16, the product takes 25 times as
    # long otherwise.
    matmul = 2 * n**3 / min(seconds(lambda: torch.mm(a, b.T, out=product), device, **how))
    name = (
        torch.cuda.get_device_name(device)
        if on_gpu
        else f"CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)}"
    )
    return Ceilings(copy, matmul, fetch, name)


def slowest(found: list[Ceilings]) -> Ceilings:
    """For each rate the lowest one of all ranks; ``found`` has the ceilings of each rank."""
    first = found[0]
    best = {name: min(getattr(c, name) for c in found) for name in ("copy", "matmul", "fetch")}
    return Ceilings(**best, device=first.device if len(found) == 1 else f"{len(found)} x {first.device}")
