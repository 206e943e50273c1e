"""The places of choices among those of the same expert. Experts are few, so choices are counted, and not sorted.

Choices come in chunks, one a program. The earlier choices of the same expert are those in earlier chunks, which a histogram
counts, and those in the same chunk, which are compared with one another. In a group's buffers, a program counts the whole
group; for the order of all choices, one kernel counts the chunks and a second one adds up.

These kernels do not overlap (overlap.py): in a CUDA graph of one block, the chain of starts took longer than the kernels.

Shape letters: G routing groups, S tokens of a group, K choices a token, E experts, P choices in all, C chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit.nn import gate
from moekit.nn.gates import Top1, Top2

# Choices of a chunk, and warps of a program that fills.
CHUNK, WARPS = 128, 8
# The most experts, and tokens of a group, whose counts a program makes at once.
EXPERTS, TOKENS = 4096 - 1, 4096
# Experts of a program that adds up, and chunks at a time.
TOGETHER, CHUNKS = 16, 1024

# ------------------------------------------------------------------------------------------------------- the buffers


def fill(
    rule: gate.Gate,
    probs: Tensor,
    experts: Tensor,
    gate_probs: Tensor,
    weights: Tensor,
    kept: Tensor | None,
    padding: Tensor | None,
    capacity: int | None,
) -> tuple[Tensor, Tensor]:
    """Compute :meth:`moekit.nn.gate.Gate.fill`, for the gates of fairseq with a kernel where only the capacity drops choices."""
    groups, tokens, top_k = experts.shape
    known = type(rule) is Top1 or (type(rule) is Top2 and not rule.config.batch_prioritized)
    counted = CHUNK <= tokens <= TOKENS and rule.config.experts <= EXPERTS and weights.dtype == torch.float32
    if not known or not counted or kept is not None or padding is not None or capacity is None:
        return rule.fill(probs, experts, gate_probs, weights, kept, padding, capacity)
    kept, filled = torch.empty_like(experts, dtype=torch.bool), torch.empty_like(weights)
    again = top_k == 2 and not rule.config.normalize_before_dropping
    _fill[(triton.cdiv(tokens, CHUNK), groups)](
        experts.contiguous(),
        (gate_probs if again else weights).contiguous(),
        kept,
        filled,
        tokens,
        capacity,
        torch.finfo(torch.float32).eps,
        K=top_k,
        AGAIN=again,
        BINS=triton.next_power_of_2(rule.config.experts),
        CHUNK=CHUNK,
        BLOCK=triton.next_power_of_2(tokens),
        num_warps=WARPS,
    )
    return kept, filled


# chosen: [G, S, K]. weights: [G, S, K], what the choices weigh; AGAIN: their probabilities, divided by the sum of the kept ones.
# kept, filled: [G, S, K].
@triton.jit(do_not_specialize=["tokens", "capacity"])
def _fill(
    chosen,
    weights,
    kept,
    filled,
    tokens,
    capacity,
    eps,
    K: tl.constexpr,
    AGAIN: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64) * tokens * K
    begin = tl.program_id(0) * CHUNK
    token = begin + tl.arange(0, CHUNK)
    there = token < tokens
    at = group + token * K
    every = tl.arange(0, BLOCK)
    all_at = group + every * K
    # All loads are under way before the first of them is needed.
    expert = tl.load(chosen + all_at, mask=every < tokens, other=0).to(tl.int32)
    mine = tl.load(chosen + at, mask=there, other=0).to(tl.int32)
    one = tl.load(weights + at, mask=there, other=0.0)
    if K == 2:
        other = tl.load(chosen + all_at + 1, mask=every < tokens, other=0).to(tl.int32)
        my_other = tl.load(chosen + at + 1, mask=there, other=0).to(tl.int32)
        two = tl.load(weights + at + 1, mask=there, other=0.0)
    place = tl.gather(tl.histogram(expert, BINS, mask=every < begin), mine, 0)
    first = place + _earlier(mine, CHUNK) < capacity
    one = tl.where(first, one, 0.0)
    if K == 2:
        # A group's first choices come before its second ones.
        count = tl.histogram(expert, BINS, mask=every < tokens)
        place = tl.gather(count + tl.histogram(other, BINS, mask=every < begin), my_other, 0)
        second = place + _earlier(my_other, CHUNK) < capacity
        two = tl.where(second, two, 0.0)
        if AGAIN:
            total = tl.maximum(one + two, eps)
            one = tl.math.div_rn(one, total)
            two = tl.math.div_rn(two, total)
        tl.store(kept + at + 1, second, mask=there)
        tl.store(filled + at + 1, two, mask=there)
    tl.store(kept + at, first, mask=there)
    tl.store(filled + at, one, mask=there)


@triton.jit
def _earlier(expert, CHUNK: tl.constexpr):
    """How many earlier choices of a chunk are of the same expert."""
    i = tl.arange(0, CHUNK)
    same = (expert[:, None] == expert[None, :]) & (i[None, :] < i[:, None])
    return tl.sum(same.to(tl.int32), axis=1)


# --------------------------------------------------------------------------------------------------------- the order


def sort_by_expert(chosen: Tensor, kept: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """[P] integers and [P] bool, the expert of each choice and whether it is kept -> what :func:`moekit.nn.gate.by_expert` returns."""
    if experts > EXPERTS or not len(chosen):
        return gate.sort_by_expert(torch.where(kept, chosen, experts), experts)
    choices = len(chosen)
    order = torch.empty(choices, dtype=torch.long, device=chosen.device)
    counts = torch.empty(experts, dtype=torch.long, device=chosen.device)
    chunks = triton.cdiv(choices, CHUNK)
    # One more for choices of no expert.
    width = triton.cdiv(experts + 1, TOGETHER) * TOGETHER
    parts = torch.empty(chunks, width, dtype=torch.int32, device=chosen.device)
    sizes = {"WIDTH": width, "BINS": triton.next_power_of_2(width), "CHUNK": CHUNK}
    given = chosen.contiguous(), kept.contiguous(), parts
    _count[(chunks,)](*given, choices, experts, **sizes)
    _add_up[(width // TOGETHER,)](
        parts,
        counts,
        chunks,
        experts,
        WIDTH=width,
        TOGETHER=TOGETHER,
        CHUNKS=min(CHUNKS, triton.next_power_of_2(chunks)),
        num_warps=8,
    )
    _place[(chunks,)](*given, counts, order, choices, experts, **sizes)
    return order, counts


@triton.jit
def _chunk(chosen, kept, choices, experts, CHUNK: tl.constexpr):
    """A program's choices, whether they are there, and their experts; E for none."""
    choice = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    there = choice < choices
    expert = tl.load(chosen + choice, mask=there, other=0).to(tl.int32)
    return choice, there, tl.where(tl.load(kept + choice, mask=there, other=0) != 0, expert, experts)


# chosen, kept: [P]. parts: [C, WIDTH], how often each expert is in a chunk, and none.
@triton.jit(do_not_specialize=["choices", "experts"])
def _count(
    chosen, kept, parts, choices, experts, WIDTH: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr
):
    _, there, expert = _chunk(chosen, kept, choices, experts, CHUNK)
    one = tl.arange(0, BINS)
    count = tl.histogram(expert, BINS, mask=there)
    tl.store(parts + tl.program_id(0).to(tl.int64) * WIDTH + one, count, mask=one < WIDTH)


# Afterwards parts has the counts of all chunks before each one. counts: [E].
@triton.jit(do_not_specialize=["chunks", "experts"])
def _add_up(
    parts, counts, chunks, experts, WIDTH: tl.constexpr, TOGETHER: tl.constexpr, CHUNKS: tl.constexpr
):
    expert = tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER)
    before = tl.zeros((TOGETHER,), tl.int32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        at = parts + chunk[:, None].to(tl.int64) * WIDTH + expert[None, :]
        count = tl.load(at, mask=(chunk < chunks)[:, None], other=0)
        tl.store(at, tl.cumsum(count, axis=0) - count + before[None, :], mask=(chunk < chunks)[:, None])
        before += tl.sum(count, axis=0)
    tl.store(counts + expert, before.to(tl.int64), mask=expert < experts)


# order: [P], the choices sorted by expert.
@triton.jit(do_not_specialize=["choices", "experts"])
def _place(
    chosen,
    kept,
    parts,
    counts,
    order,
    choices,
    experts,
    WIDTH: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    choice, there, expert = _chunk(chosen, kept, choices, experts, CHUNK)
    before = parts + tl.program_id(0).to(tl.int64) * WIDTH
    place = _earlier(expert, CHUNK) + tl.load(before + expert, mask=there, other=0)
    one = tl.arange(0, BINS)
    count = tl.load(counts + one, mask=one < experts, other=0).to(tl.int32)
    place += tl.gather(tl.cumsum(count, axis=0) - count, expert, 0)
    tl.store(order + place, choice.to(tl.int64), mask=there)
