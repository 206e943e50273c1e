"""Add pending outputs to the residual stream and normalise the sum, in one pass.

Shape letters: N tokens, K choices per token, D model dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from moekit.nn.kernels.overlap import overlapped, start, wait

# Tokens per program; one where they are few, as in a decode step.
ROWS, FEW = 4, 256


def add_norm(x: Tensor, pending: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Compute :func:`moekit.nn.operations.add_norm`; for inference. It rounds where the plain function rounds."""
    x, dim = x.contiguous(), x.shape[-1]
    rows = x.numel() // dim
    normed = torch.empty_like(x)
    total = x if pending is None else torch.empty_like(x)
    if rows:
        each = 1 if rows <= FEW else ROWS
        _add_norm[(triton.cdiv(rows, each),)](
            x,
            None if pending is None else pending.contiguous(),
            norm.weight,
            norm.bias,
            total,
            normed,
            rows,
            norm.eps,
            PARTS=0 if pending is None else pending.numel() // x.numel(),
            D=dim,
            ROWS=each,
            BLOCK=triton.next_power_of_2(dim),
            num_warps=4,
            **overlapped(x.device),
        )
    return total, normed


# x, total and normed [N, D]; pending [N, PARTS, D] or None; weight and bias [D].
@triton.jit(do_not_specialize=["rows"])
def _add_norm(
    x,
    pending,
    weight,
    bias,
    total,
    normed,
    rows,
    eps,
    PARTS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    real = column < D
    here = (row < rows)[:, None] & real[None, :]
    at = row[:, None] * D + column[None, :]
    kind: tl.constexpr = x.dtype.element_ty
    # No kernel writes the norm's weights, so they are read before the wait for earlier kernels.
    w = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=real, other=0.0).to(tl.float32)
    wait(OVERLAP)
    mine = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    if PARTS > 0:
        mine = with_parts(mine, pending, row, column, here, PARTS, D, kind)
        tl.store(total + at, mine, mask=here)
        mine = mine.to(tl.float32)
    tl.store(normed + at, normalised(mine, w, b, real, D, eps).to(kind), mask=here)


@triton.jit
def with_parts(
    mine, pending, row, column, here, PARTS: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr, FRESH: tl.constexpr = False
):  # fmt: skip
    """``mine`` plus the sum of its parts in ``pending``, rounded as the plain functions round.

    FRESH: peers wrote the parts while this kernel ran, so the loads bypass the cache of the multiprocessor.
    """
    part = row[:, None] * (PARTS * D) + column[None, :]
    coming = tl.load(pending + part, mask=here, other=0.0, volatile=FRESH).to(tl.float32)
    for k in tl.static_range(1, PARTS):
        coming += tl.load(pending + part + k * D, mask=here, other=0.0, volatile=FRESH).to(tl.float32)
    return (mine + coming.to(KIND).to(tl.float32)).to(KIND)


@triton.jit
def normalised(mine, w, b, real, D: tl.constexpr, eps):
    """The layer norm of rows in float32, with gain ``w`` and shift ``b``; ``real``: the columns that there are."""
    mean = tl.sum(mine, axis=1) / D
    off = tl.where(real[None, :], mine - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(off * off, axis=1) / D + eps)
    return off * scale[:, None] * w[None, :] + b[None, :]
