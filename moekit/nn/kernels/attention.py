"""Attention of one new token per sequence: the kernel writes the token's key and value and reads only the filled slots.

Shape letters: B sequences, H heads, C head dim, M slots of the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit.nn.kernels.overlap import overlapped, start, wait

# Up to so many programs -> the slots that a program reads at a time, and its warps. The fewer programs there are, the more
# slots each has under way; many small ones share the multiprocessors evenly.
BLOCKS = {132: (256, 8), 264: (128, 4), 396: (64, 2)}
MANY = (32, 1)


def attend_one(qkv: Tensor, kv: Tensor, lengths: Tensor) -> Tensor:
    """Attend from one new token of each sequence; for inference.

    Args:
        qkv: [B, 3, H, C], queries, keys and values of the new tokens.
        kv: [2, B, H, M, C], a layer of a :class:`moekit.nn.cache.Cache`; the kernel fills slot ``lengths[b]``.
        lengths: [B] int64, the number of tokens before the new one.

    Returns:
        [B, H C], the output of all heads.
    """
    batch, _, heads, dim = qkv.shape
    assert qkv.is_contiguous() and kv.is_contiguous()
    out = torch.empty(batch, heads * dim, dtype=qkv.dtype, device=qkv.device)
    slots, warps = next((found for most, found in BLOCKS.items() if batch * heads <= most), MANY)
    _attend_one[(batch, heads)](
        qkv,
        kv,
        lengths,
        out,
        kv.shape[3],
        dim**-0.5,
        H=heads,
        C=dim,
        BLOCK=triton.next_power_of_2(dim),
        SLOTS=slots,
        num_warps=warps,
        **overlapped(qkv.device),
    )
    return out


@triton.jit(do_not_specialize=["slots"])
def _attend_one(
    qkv,
    kv,
    lengths,
    out,
    slots,
    scale,
    H: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start(OVERLAP)
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BLOCK)
    real = c < C
    length = tl.load(lengths + b)
    keys = kv + (b * H + h) * slots * C
    values = keys + tl.num_programs(0).to(tl.int64) * H * slots * C
    slot = tl.arange(0, SLOTS)
    at = slot[:, None] * C + c[None, :]
    # Earlier steps wrote these, so they are read before the wait for the earlier kernels of this step.
    here = (slot < length)[:, None] & real[None, :]
    k = tl.load(keys + at, mask=here, other=0.0)
    v = tl.load(values + at, mask=here, other=0.0)
    wait(OVERLAP)
    new = qkv + (b * 3 * H + h) * C + c
    q = tl.load(new, mask=real, other=0.0).to(tl.float32) * scale
    key = tl.load(new + H * C, mask=real, other=0.0)
    value = tl.load(new + 2 * H * C, mask=real, other=0.0)
    tl.store(keys + length * C + c, key, mask=real)
    tl.store(values + length * C + c, value, mask=real)

    # The softmax is online: it keeps the greatest score so far and sums relative to that score.
    top = float("-inf")
    total = 0.0
    found = tl.zeros((BLOCK,), dtype=tl.float32)
    for done in range(0, length, SLOTS):
        # The next slots are on their way while these are computed with.
        ahead = done + SLOTS
        here = (ahead + slot < length)[:, None] & real[None, :]
        next_k = tl.load(keys + ahead * C + at, mask=here, other=0.0)
        next_v = tl.load(values + ahead * C + at, mask=here, other=0.0)
        score = tl.sum(k.to(tl.float32) * q[None, :], axis=1)
        score = tl.where(done + slot < length, score, float("-inf"))
        greatest = tl.maximum(top, tl.max(score, axis=0))
        share, fade = tl.exp(score - greatest), tl.exp(top - greatest)
        found = found * fade + tl.sum(share[:, None] * v.to(tl.float32), axis=0)
        total = total * fade + tl.sum(share, axis=0)
        top, k, v = greatest, next_k, next_v
    # The new token comes last.
    own = tl.sum(q * key.to(tl.float32), axis=0)
    greatest = tl.maximum(top, own)
    share, fade = tl.exp(own - greatest), tl.exp(top - greatest)
    found = found * fade + share * value.to(tl.float32)
    total = total * fade + share
    tl.store(out + (b * H + h) * C + c, (found / total).to(out.dtype.element_ty), mask=real)
