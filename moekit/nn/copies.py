"""Copies between the host and the device that wait for nothing else.

A plain copy waits for all work that was launched before it, and the host waits with it. With these copies the host launches a
step while the device is at work on the one before.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


class Feed:
    """Tensors of ids, int64, that stay where they are on a device, and that arrays of the host fill in one copy."""

    def __init__(self, device: torch.device, *shapes: tuple[int, ...]):
        sizes = [math.prod(shape) for shape in shapes]
        # Each begins at a multiple of 16 bytes: kernels are compiled for such addresses, and again for others.
        rooms = [size + size % 2 for size in sizes]
        on_gpu = device.type == "cuda"
        # From pinned memory alone the device copies by itself.
        self.host = torch.empty(sum(rooms), dtype=torch.long, pin_memory=on_gpu)
        self.there = torch.empty_like(self.host, device=device) if on_gpu else self.host
        self.copied = torch.cuda.Event() if on_gpu else None

        def views(whole: Tensor) -> list[Tensor]:
            parts = zip(whole.split(rooms), sizes, shapes, strict=True)
            return [room[:size].view(shape) for room, size, shape in parts]

        self.arrays, self.tensors = [own.numpy() for own in views(self.host)], views(self.there)

    def __call__(self, *ids: np.ndarray) -> list[Tensor]:
        """The tensors, with ``ids`` in them once the device has done what was launched before."""
        if self.copied is None:
            return self.fill(*ids)
        # The device may still copy what was here before.
        self.copied.synchronize()
        tensors = self.fill(*ids)
        self.copied.record()
        return tensors

    def fill(self, *ids: np.ndarray) -> list[Tensor]:
        """As a call that is the only one, for which no other waits."""
        for own, given in zip(self.arrays, ids, strict=True):
            own[...] = given
        if self.there is not self.host:
            self.there.copy_(self.host, non_blocking=True)
        return self.tensors


def on_device(device: torch.device, *ids: np.ndarray) -> list[Tensor]:
    """Arrays of ids as int64 on ``device``, all in one copy."""
    return Feed(device, *(own.shape for own in ids)).fill(*ids)


class Copy:
    """A copy of a tensor to the host, made after the work that was launched before it; later work does not delay it."""

    def __init__(self, tensor: Tensor):
        self.done: torch.cuda.Event | None = None
        self.host = tensor
        if tensor.is_cuda:
            self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.host.copy_(tensor, non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record()

    def array(self) -> np.ndarray:
        """The tensor's numbers, once they are there."""
        if self.done is None:
            return self.host.numpy()
        self.done.synchronize()
        # There is little pinned memory, and the next step needs it.
        return self.host.numpy().copy()
