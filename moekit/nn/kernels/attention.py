"""Attention of one new token per sequence: the kernel writes the token's key and value and reads only the filled slots.

Shape letters: B sequences, H heads, C head dim, M slots of the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit.nn.kernels.overlap import overlapped, start, wait

# (slots read at a time, warps). With few programs, each reads more slots at a time, so that it does not wait for each
# load.
FEW_PROGRAMS, ALONE, IN_COMPANY = 264, (256, 8), (128, 4)


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
    slots, warps = ALONE if batch * heads <= FEW_PROGRAMS else IN_COMPANY
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
    wait(OVERLAP)
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BLOCK)
    real = c < C
    new = qkv + (b * 3 * H + h) * C + c
    q = tl.load(new, mask=real, other=0.0).to(tl.float32) * scale
    key = tl.load(new + H * C, mask=real, other=0.0)
    value = tl.load(new + 2 * H * C, mask=real, other=0.0)
    length = tl.load(lengths + b)
    keys = kv + (b * H + h) * slots * C
    values = keys + tl.num_programs(0).to(tl.int64) * H * slots * C
    tl.store(keys + length * C + c, key, mask=real)
    tl.store(values + length * C + c, value, mask=real)

    # The softmax is online: it keeps the greatest score so far and sums relative to that score. The new token comes first.
    top = tl.sum(q * key.to(tl.float32), axis=0)
    total = top * 0.0 + 1.0
    found = value.to(tl.float32)
    for done in range(0, length, SLOTS):
        slot = done + tl.arange(0, SLOTS)
        there = slot < length
        at = slot[:, None] * C + c[None, :]
        here = there[:, None] & real[None, :]
        k = tl.load(keys + at, mask=here, other=0.0).to(tl.float32)
        score = tl.where(there, tl.sum(k * q[None, :], axis=1), float("-inf"))
        greatest = tl.maximum(top, tl.max(score, axis=0))
        share, fade = tl.exp(score - greatest), tl.exp(top - greatest)
        v = tl.load(values + at, mask=here, other=0.0).to(tl.float32)
        found = found * fade + tl.sum(share[:, None] * v, axis=0)
        total = total * fade + tl.sum(share, axis=0)
        top = greatest
    tl.store(out + (b * H + h) * C + c, (found / total).to(out.dtype.element_ty), mask=real)
