"""Log-probabilities of targets or of the best token: logits are read once in their dtype, and no softmax is stored.

Shape letters: N rows, V dictionary, P parts of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit.nn.kernels.overlap import overlapped, start, wait
from moekit.symbols import PAD

# The number of parts in which a row of logits is read, one part per program. With one program per row, a few rows would
# leave most of a GPU idle.
PARTS = 32


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
    # The sizes are constants, so that Triton knows which addresses are multiples of 16 bytes. Each lane takes WIDTH
    # columns at a time and keeps its greatest logit and a sum relative to that; the lanes are combined at the end.
    column = lane[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    greatest = tl.full((LANES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((LANES,), dtype=tl.float32)
    for done in range(0, VOCAB, LANES * WIDTH):
        here = done + column < VOCAB
        x = tl.load(logits + row * STRIDE + done + column, mask=here, other=float("-inf")).to(tl.float32)
        new = tl.maximum(greatest, tl.max(x, axis=1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(greatest - shift) + tl.sum(tl.exp(x - shift[:, None]), axis=1)
        greatest = new
    top = tl.max(greatest, axis=0)
    total = tl.sum(total * tl.exp(greatest - top), axis=0)
    target = tl.load(logits + row * STRIDE + tl.load(targets + row)).to(tl.float32)
    tl.store(found + row, target - top - tl.log(total))


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """[N, V] logits -> the best token of each row, padding excluded, [N] int64, and its log-probability [N] float32."""
    rows = len(logits)
    found = torch.empty(rows, dtype=torch.long, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        how = {"PARTS": PARTS, "num_warps": 1} | overlapped(logits.device)
        _best_of_row[(rows,)](_parts(logits), found, logprobs, rows, **how)
    return found, logprobs


def feed_back(
    logits: Tensor, read: Tensor, lengths: Tensor, before: Tensor, words: Tensor, slots: int
) -> None:
    """Compute :func:`moekit.nn.operations.feed_back`; for inference."""
    rows = len(logits)
    if rows:
        how = {"ROOM": len(words), "PARTS": PARTS, "num_warps": 1} | overlapped(logits.device)
        _feed_back[(rows,)](_parts(logits), read, lengths, before, words, rows, slots, **how)


def _parts(logits: Tensor) -> Tensor:
    """[4, N, P] float32: of each part of each row the greatest logit, the sum of exponentials relative to it, the greatest logit
    that is no padding, and its column."""
    rows, vocab = logits.shape
    parts = torch.empty(4, rows, PARTS, dtype=torch.float32, device=logits.device)
    part = triton.cdiv(vocab, PARTS)
    _best_of_part[(PARTS, rows)](
        logits,
        parts,
        rows,
        VOCAB=vocab,
        STRIDE=logits.stride(0),
        PAD=PAD,
        PART=part,
        BLOCK=triton.next_power_of_2(part),
        PARTS=PARTS,
        num_warps=4,
        **overlapped(logits.device),
    )
    return parts


@triton.jit(do_not_specialize=["rows"])
def _best_of_part(
    logits,
    parts,
    rows,
    VOCAB: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start(OVERLAP)
    wait(OVERLAP)
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BLOCK)
    column = part * PART + i
    here = (i < PART) & (column < VOCAB)
    x = tl.load(logits + row * STRIDE + column, mask=here, other=float("-inf")).to(tl.float32)
    top = tl.max(x, axis=0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(x - shift), axis=0)
    x = tl.where(column == PAD, float("-inf"), x)
    at = parts + row * PARTS + part
    tl.store(at, top)
    tl.store(at + rows * PARTS, total)
    tl.store(at + 2 * rows * PARTS, tl.max(x, axis=0))
    # Among NaNs, a GPU may return the last lane. The ids of a dictionary are exact in float32.
    where = tl.minimum(part * PART + tl.argmax(x, axis=0, tie_break_left=True), VOCAB - 1)
    tl.store(at + 3 * rows * PARTS, where.to(tl.float32))


@triton.jit
def _joined(parts, row, rows, PARTS: tl.constexpr):
    """The best token of a row, int64, and its log-probability."""
    part = tl.arange(0, PARTS)
    at = parts + row * PARTS + part
    top = tl.load(at)
    greatest = tl.max(top, axis=0)
    total = tl.sum(tl.load(at + rows * PARTS) * tl.exp(top - greatest), axis=0)
    value = tl.load(at + 2 * rows * PARTS)
    chosen = part == tl.argmax(value, axis=0, tie_break_left=True)
    column = tl.sum(tl.where(chosen, tl.load(at + 3 * rows * PARTS), 0.0), axis=0)
    return column.to(tl.int64), tl.max(value, axis=0) - greatest - tl.log(total)


@triton.jit(do_not_specialize=["rows"])
def _best_of_row(parts, found, logprobs, rows, PARTS: tl.constexpr, OVERLAP: tl.constexpr):
    start(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0)
    token, logprob = _joined(parts, row, rows, PARTS)
    tl.store(found + row, token)
    tl.store(logprobs + row, logprob)


@triton.jit(do_not_specialize=["rows", "slots"])
def _feed_back(
    parts,
    read,
    lengths,
    before,
    words,
    rows,
    slots,
    ROOM: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0)
    length = tl.load(lengths + row)
    place = (length - tl.load(before + row)) % ROOM
    token, logprob = _joined(parts, row, rows, PARTS)
    bits = logprob.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.store(words + place * rows + row, token << 32 | bits)
    tl.store(read + row, token)
    tl.store(lengths + row, tl.minimum(length + 1, slots - 1))
