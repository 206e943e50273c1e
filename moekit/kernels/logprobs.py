"""Log-probabilities of targets from logits in the model's dtype: read once, no float32 copy, no softmax written.

Shape letters: N rows, V dictionary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def target_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """[N, V] logits and [N] int64 targets -> [N] float32 natural log-probabilities; for inference."""
    rows, vocab = logits.shape
    found = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        _target_log_probs[(rows,)](
            logits,
            targets.contiguous(),
            found,
            VOCAB=vocab,
            STRIDE=logits.stride(0),
            LANES=512,
            WIDTH=8,
            num_warps=8,
        )
    return found


@triton.jit
def _target_log_probs(
    logits,
    targets,
    found,
    VOCAB: tl.constexpr,
    STRIDE: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    # The sizes are constants, so that Triton sees which addresses are multiples of 16 bytes. Each lane takes WIDTH
    # columns at a time and keeps the greatest it has seen, with a sum relative to that; lanes meet at the end.
    column = lane[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    greatest = tl.full((LANES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((LANES,), dtype=tl.float32)
    for start in range(0, VOCAB, LANES * WIDTH):
        here = start + column < VOCAB
        x = tl.load(logits + row * STRIDE + start + column, mask=here, other=float("-inf")).to(tl.float32)
        new = tl.maximum(greatest, tl.max(x, axis=1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(greatest - shift) + tl.sum(tl.exp(x - shift[:, None]), axis=1)
        greatest = new
    top = tl.max(greatest, axis=0)
    total = tl.sum(total * tl.exp(greatest - top), axis=0)
    target = tl.load(logits + row * STRIDE + tl.load(targets + row)).to(tl.float32)
    tl.store(found + row, target - top - tl.log(total))
