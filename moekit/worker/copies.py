"""Copies between the host and the device that wait for nothing else.

A plain copy waits for all work that was launched before it, and the host waits with it. With these copies the host launches a
step while the device is at work on the one before.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Behind an odd number of ids.
_FILL = np.zeros(1, np.int64)


def on_device(device: torch.device, *ids: np.ndarray) -> list[Tensor]:
    """Arrays of ids as int64 on ``device``, all in one copy."""
    if device.type != "cuda":
        return [torch.from_numpy(own).long() for own in ids]
    # Each begins at a multiple of 16 bytes: kernels are compiled for such addresses, and again for others.
    rooms = [own.size + own.size % 2 for own in ids]
    parts = [part for own in ids for part in (own.ravel(), _FILL[: own.size % 2])]
    # From pinned memory alone the device copies by itself. Torch keeps that memory until it has.
    host = torch.empty(sum(rooms), dtype=torch.long, pin_memory=True)
    np.concatenate(parts, out=host.numpy())
    sent = host.to(device, non_blocking=True).split(rooms)
    return [room[: own.size].view(own.shape) for room, own in zip(sent, ids, strict=True)]


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
