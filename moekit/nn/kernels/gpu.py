"""What a GPU is, for the choice of kernels and of their grids."""

from __future__ import annotations

import functools

import torch


@functools.lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU, such as (9, 0) of Hopper; (0, 0) elsewhere."""
    known = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if known else (0, 0)


def is_hopper(device: torch.device) -> bool:
    """Whether ``device`` is of the generation that kernels with specialised warps are for, and on which most is measured."""
    return capability(device) == (9, 0)


def since_hopper(device: torch.device) -> bool:
    """Whether ``device`` is of Hopper or a later generation, where a kernel may start before the one before it ends."""
    return capability(device) >= (9, 0)


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors ``device`` has; the CPU counts as one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
