"""Kernels that start while the previous kernel still runs: Hopper's programmatic dependent launch.

A kernel calls ``start`` where the next one may start, mostly first, and ``wait`` before it touches what an earlier kernel
writes or reads. Between the two calls it may prefetch data that no kernel writes, such as weights. Since every such
kernel calls both, a kernel that has waited can rely on all earlier ones being complete.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moekit.nn.kernels.gpu import since_hopper


def overlapped(device: torch.device) -> dict[str, bool]:
    """The launch options of such a kernel on ``device``."""
    return {"OVERLAP": True, "launch_pdl": True} if since_hopper(device) else {"OVERLAP": False}


@triton.jit
def start(OVERLAP: tl.constexpr):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(OVERLAP: tl.constexpr):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
