"""Causal attention of whole sequences: the keys pass by in blocks, and no matrix of scores is stored.

The softmax is online, as in FlashAttention-2 (Dao 2023, arXiv 2307.08691). Queries, keys and values are read where the
projection wrote them, and the output is written as the next projection reads it.

Shape letters: B sequences, T tokens of a sequence, H heads, C head dim.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moekit.nn.kernels.gpu import is_hopper, multiprocessors

# The head dims that this is measured for, and the keys that a program of QUERIES queries takes at a time. Three programs fit on a
# multiprocessor (two with heads of 128), and some multiply while others are at their exponentials.
KEYS = {64: 128, 128: 64}
QUERIES, WARPS = 64, 4


def stages(programs: int, dim: int, device: torch.device) -> int:
    """Blocks of keys under way. Where few programs share a multiprocessor, each may have one more."""
    return 3 if dim == 128 or programs <= 3 * multiprocessors(device) else 2


def fits(qkv: Tensor) -> bool:
    """Whether the kernel takes ``qkv`` [B, T, 3, H, C] here, which is where it is measured to be faster than torch's."""
    return qkv.itemsize == 2 and qkv.shape[-1] in KEYS and qkv.is_contiguous() and is_hopper(qkv.device)


def attend_blocks(qkv: Tensor) -> Tensor:
    """Attend from each token to the tokens up to its own; for inference.

    Args:
        qkv: [B, T, 3, H, C], queries, keys and values of whole sequences.

    Returns:
        [B, T, H C]. A sequence's numbers do not depend on the other sequences.
    """
    batch, tokens, _, heads, dim = qkv.shape
    out = torch.empty(batch, tokens, heads * dim, dtype=qkv.dtype, device=qkv.device)
    tiles = triton.cdiv(tokens, QUERIES)
    programs, rows = batch * tiles * heads, qkv.flatten(2)
    if out.numel():
        _attend_blocks[(programs,)](
            # Hopper's copy engine takes blocks of one head's tokens from these, with zeros beyond the end of a sequence.
            TensorDescriptor.from_tensor(rows, [1, QUERIES, dim]),
            TensorDescriptor.from_tensor(rows, [1, KEYS[dim], dim]),
            out,
            tokens,
            tiles,
            # The exponentials are powers of two, which the hardware has.
            dim**-0.5 * math.log2(math.e),
            H=heads,
            C=dim,
            QUERIES=QUERIES,
            KEYS=KEYS[dim],
            num_warps=WARPS,
            num_stages=stages(programs, dim, qkv.device),
        )
    return out


# queries, keys: descriptors of [B, T, 3 H C]; out [B, T, H C].
@triton.jit(do_not_specialize=["tokens", "tiles"])
def _attend_blocks(
    queries,
    keys,
    out,
    tokens,
    tiles,
    scale,
    H: tl.constexpr,
    C: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    # The heads of a sequence run side by side, and the programs with the most keys begin.
    program = tl.program_id(0)
    h, tile, b = program % H, tiles - 1 - program // H % tiles, program // H // tiles
    first = tile * QUERIES
    q = queries.load([b, first, h * C]).reshape(QUERIES, C)
    # The softmax is online: it keeps the greatest score so far and sums relative to that score.
    top = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    found = tl.zeros((QUERIES, C), dtype=tl.float32)
    row = first + tl.arange(0, QUERIES)
    for start in range(0, first + QUERIES, KEYS):
        k = keys.load([b, start, (H + h) * C]).reshape(KEYS, C)
        score = tl.dot(q, k.T)
        # Only the last block has keys that come after a query.
        if start + KEYS > first:
            score = tl.where(row[:, None] >= start + tl.arange(0, KEYS)[None, :], score, float("-inf"))
        greatest = tl.maximum(top, tl.max(score, axis=1) * scale)
        share, fade = tl.exp2(score * scale - greatest[:, None]), tl.exp2(top - greatest)
        total = total * fade + tl.sum(share, axis=1)
        v = keys.load([b, start, (2 * H + h) * C]).reshape(KEYS, C)
        found = tl.dot(share.to(v.dtype), v, found * fade[:, None])
        top = greatest
    at = b.to(tl.int64) * tokens * (H * C) + (row[:, None] * H + h) * C + tl.arange(0, C)[None, :]
    tl.store(out + at, (found * (1 / total)[:, None]).to(out.dtype.element_ty), mask=(row < tokens)[:, None])
