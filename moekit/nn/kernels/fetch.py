"""Bring memory into the GPU's second-level cache ahead of time, in the background."""

from __future__ import annotations

import triton
import triton.language as tl

# One thread asks for $2 bytes at $1, if these are not 0, and goes on.
ASK = tl.constexpr(
    """
    {
    .reg .pred asks, some;
    .reg .b32 thread;
    mov.u32 thread, %tid.x;
    setp.eq.u32 asks, thread, 0;
    setp.ne.and.u32 some, $2, 0, asks;
    @some cp.async.bulk.prefetch.L2.global [$1], $2;
    mov.u32 $0, 0;
    }
    """
)


@triton.jit
def fetch(at, size):
    """Ask for ``size`` bytes at ``at``, both multiples of 16."""
    tl.inline_asm_elementwise(ASK, "=r,l,r", [at.to(tl.int64), size], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def to_cache(at, OVERLAP: tl.constexpr):
    """Have the lines of the addresses ``at`` brought into the cache of the GPU, on the GPUs whose kernels overlap."""
    if OVERLAP:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [at.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
