"""Copies between the host and the device that wait for nothing else.

A plain copy waits for all work that was launched before it, and the host waits with it. With these copies the host launches a
step while the device is at work on the one before.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def on_device(ids: np.ndarray, device: torch.device) -> Tensor:
    """Ids as int64 on ``device``."""
    host = torch.from_numpy(ids)
    if device.type == "cuda":
        # From pinned memory alone the device copies by itself. Torch keeps that memory until it has.
        host = host.pin_memory()
    return host.to(device, non_blocking=True).long()


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
