"""The places of choices among those of the same expert. Experts are few, so choices are counted, and not sorted.

Choices come in chunks of tokens, one a program. A first kernel counts each expert's choices in each chunk, a second one adds
up, and a third one knows then how many come before its chunk. Within a chunk, choices are compared with one another. From
these numbers follow both the places in the buffers of a routing group and the places in the order of all choices.

These kernels do not overlap (overlap.py): in a CUDA graph of one block, the chain of starts took longer than the kernels.

Shape letters: G routing groups, S tokens of a group, K choices a token, E experts, P choices in all, C chunks of a group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit.nn import gate
from moekit.nn.gates import Top1, Top2

# Tokens of a chunk. A program compares all of them with one another.
CHUNK = 64
# The most experts whose counts a program has at once.
EXPERTS = 4096
# Experts of a program that adds up, and chunks at a time.
TOGETHER, CHUNKS = 16, 1024
# A capacity that drops nothing. Added to the number of choices, it still fits into 32 bits.
ANY = 1 << 30


def fill(
    rule: gate.Gate,
    probs: Tensor,
    experts: Tensor,
    gate_probs: Tensor,
    weights: Tensor,
    kept: Tensor | None,
    padding: Tensor | None,
    capacity: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Compute :meth:`moekit.nn.gate.Gate.fill`, for the gates of fairseq with kernels where only the capacity drops choices."""
    _, tokens, top_k = experts.shape
    known = type(rule) is Top1 or (type(rule) is Top2 and not rule.config.batch_prioritized)
    counted = CHUNK <= tokens and rule.config.experts <= EXPERTS and weights.dtype == torch.float32
    if not known or not counted or kept is not None or padding is not None or capacity is None:
        return rule.fill(probs, experts, gate_probs, weights, kept, padding, capacity, dtype)
    again = top_k == 2 and not rule.config.normalize_before_dropping
    kept, filled = torch.empty_like(experts, dtype=torch.bool), torch.empty_like(weights, dtype=dtype)
    filling = (gate_probs if again else weights).contiguous(), filled, again
    return kept, filled, _placed(experts.contiguous(), kept, rule.config.experts, capacity, filling)


def sort_by_expert(chosen: Tensor, kept: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """[P] integers and [P] bool, the expert of each choice and whether it is kept -> what :func:`moekit.nn.gate.by_expert` returns."""
    if experts > EXPERTS or not len(chosen):
        return gate.sort_by_expert(torch.where(kept, chosen, experts), experts)
    return _placed(chosen.contiguous()[None, :, None], kept.contiguous(), experts, ANY)


def _placed(
    chosen: Tensor,
    kept: Tensor,
    experts: int,
    capacity: int,
    filling: tuple[Tensor, Tensor, bool] | None = None,
) -> tuple[Tensor, Tensor]:
    """The order and the counts of :func:`moekit.nn.gate.by_expert`, of choices [G, S, K].

    Args:
        kept: [G, S, K] bool; it is written where ``filling`` is given.
        filling: what the choices weigh, where to write what the kept ones weigh, and whether they are divided by their sum.
    """
    groups, tokens, top_k = chosen.shape
    weights, filled, again = filling or (None, None, False)
    order = torch.empty(chosen.numel(), dtype=torch.long, device=chosen.device)
    counts = torch.empty(experts, dtype=torch.long, device=chosen.device)
    chunks, width = triton.cdiv(tokens, CHUNK), triton.cdiv(experts, TOGETHER) * TOGETHER
    before = torch.empty(groups, chunks, top_k, width, dtype=torch.int32, device=chosen.device)
    bases = torch.empty(groups, width, dtype=torch.int32, device=chosen.device)
    sizes = {"K": top_k, "WIDTH": width}
    each = {"FILL": filling is not None, "BINS": triton.next_power_of_2(width), "CHUNK": CHUNK}
    _count[(chunks, groups)](chosen, kept, before, tokens, **sizes, **each)
    at_once = min(CHUNKS, triton.next_power_of_2(chunks))
    _add_up[(width // TOGETHER,)](
        before,
        bases,
        counts,
        groups,
        chunks,
        experts,
        capacity,
        **sizes,
        TOGETHER=TOGETHER,
        GROUPS=min(CHUNKS // at_once, triton.next_power_of_2(groups)),
        CHUNKS=at_once,
        num_warps=8,
    )
    _place[(chunks, groups)](
        chosen,
        kept,
        before,
        bases,
        counts,
        order,
        weights,
        filled,
        tokens,
        experts,
        capacity,
        torch.finfo(torch.float32).eps,
        **sizes,
        **each,
        AGAIN=again,
        num_warps=8,
    )
    return order, counts


# --------------------------------------------------------------------------------------------------------- the kernels
# chosen, kept: [G, S, K]. before: [G, C, K, WIDTH]. bases: [G, WIDTH]. counts: [E]. order: [P].
# FILL: the capacity decides what is kept; else ``kept`` says it.


@triton.jit
def _chosen(chosen, kept, choice, there, FILL: tl.constexpr):
    """The experts of choices, and which of them may have one."""
    expert = tl.load(chosen + choice, mask=there, other=0).to(tl.int32)
    if not FILL:
        there &= tl.load(kept + choice, mask=there, other=0) != 0
    return expert, there


# Afterwards ``before`` has the counts of the chunk, of first choices and of second ones.
@triton.jit(do_not_specialize=["tokens"])
def _count(
    chosen,
    kept,
    before,
    tokens,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    FILL: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    one = tl.arange(0, BINS)
    to = before + (group * tl.num_programs(0) + chunk) * (K * WIDTH)
    for k in tl.static_range(K):
        expert, live = _chosen(chosen, kept, (group * tokens + token) * K + k, token < tokens, FILL)
        tl.store(to + k * WIDTH + one, tl.histogram(expert, BINS, mask=live), mask=one < WIDTH)


# Afterwards ``before`` has the choices in the group's buffer that come before those of the chunk: a group's first choices come
# before its second ones. ``bases`` has the kept choices of all earlier groups, without the group's own first ones, which
# ``before`` has again for second choices.
@triton.jit(do_not_specialize=["groups", "chunks", "experts", "capacity"])
def _add_up(
    before,
    bases,
    counts,
    groups,
    chunks,
    experts,
    capacity,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    expert = tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER)
    kept = tl.zeros((TOGETHER,), tl.int32)
    for first_group in range(0, groups, GROUPS):
        group = first_group + tl.arange(0, GROUPS)
        seen = tl.zeros((GROUPS, TOGETHER), tl.int32)
        firsts = seen
        for k in tl.static_range(K):
            firsts = seen
            for first in range(0, chunks, CHUNKS):
                chunk = first + tl.arange(0, CHUNKS)
                row = (group[:, None].to(tl.int64) * chunks + chunk[None, :]) * K + k
                at = before + row[:, :, None] * WIDTH + expert[None, None, :]
                there = ((group < groups)[:, None] & (chunk < chunks)[None, :])[:, :, None]
                count = tl.load(at, mask=there, other=0)
                tl.store(at, tl.cumsum(count, axis=1) - count + seen[:, None, :], mask=there)
                seen += tl.sum(count, axis=1)
        here = tl.minimum(seen, capacity)
        base = tl.cumsum(here, axis=0) - here + kept[None, :] - tl.minimum(firsts, capacity)
        to = bases + group[:, None].to(tl.int64) * WIDTH + expert[None, :]
        tl.store(to, base, mask=(group < groups)[:, None])
        kept += tl.sum(here, axis=0)
    tl.store(counts + expert, kept.to(tl.int64), mask=expert < experts)


# weights: [G, S, K], what the choices weigh; AGAIN: their probabilities, divided by the sum of the kept ones. filled: [G, S, K].
@triton.jit(do_not_specialize=["tokens", "experts", "capacity"])
def _place(
    chosen,
    kept,
    before,
    bases,
    counts,
    order,
    weights,
    filled,
    tokens,
    experts,
    capacity,
    eps,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    FILL: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    AGAIN: tl.constexpr,
):
    chunk, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    before += (group * tl.num_programs(0) + chunk) * (K * WIDTH)
    bases += group * WIDTH
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    there = token < tokens
    choice = (group * tokens + token) * K
    one, live = _chosen(chosen, kept, choice, there, FILL)
    # Where each expert's choices begin in the order, and how many choices of earlier chunks are kept.
    expert = tl.arange(0, BINS)
    real = expert < experts
    count = tl.load(counts + expert, mask=real, other=0).to(tl.int32)
    start = tl.cumsum(count, axis=0) - count + tl.load(bases + expert, mask=real, other=0)
    done = tl.load(bases + expert, mask=real, other=0)
    done += tl.minimum(tl.load(before + expert, mask=real, other=0), capacity)

    # The place among the first choices of a group, and with second choices the one in the order.
    place = _among(before, one, one, live, CHUNK)
    first = live & (place < capacity)
    place = tl.minimum(place, capacity) + tl.gather(start, one, 0)
    made = first.to(tl.int32)
    if K == 2:
        done += tl.minimum(tl.load(before + WIDTH + expert, mask=real, other=0), capacity)
        two, there_two = _chosen(chosen, kept, choice + 1, there, FILL)
        place += tl.minimum(_among(before + WIDTH, one, two, there_two, CHUNK), capacity)
        other = _among(before + WIDTH, two, two, there_two, CHUNK)
        second = there_two & (other < capacity)
        other = tl.minimum(other, capacity) + tl.gather(start, two, 0)
        other += tl.minimum(_among(before, two, one, live, CHUNK), capacity)
        made += second.to(tl.int32)
    # What is not kept comes last.
    kept_before = tl.sum(done, axis=0) + tl.cumsum(made, axis=0) - made
    last = tl.sum(count, axis=0) + choice - kept_before
    tl.store(order + tl.where(first, place, last), choice, mask=there)
    if K == 2:
        last += 1 - first.to(tl.int32)
        tl.store(order + tl.where(second, other, last), choice + 1, mask=there)
    if FILL:
        tl.store(kept + choice, first, mask=there)
        weight = tl.where(first, tl.load(weights + choice, mask=there, other=0.0), 0.0)
        if K == 2:
            tl.store(kept + choice + 1, second, mask=there)
            rest = tl.where(second, tl.load(weights + choice + 1, mask=there, other=0.0), 0.0)
            if AGAIN:
                total = tl.maximum(weight + rest, eps)
                weight = tl.math.div_rn(weight, total)
                rest = tl.math.div_rn(rest, total)
            tl.store(filled + choice + 1, rest.to(filled.dtype.element_ty), mask=there)
        tl.store(filled + choice, weight.to(filled.dtype.element_ty), mask=there)


@triton.jit
def _among(before, expert, others, live, CHUNK: tl.constexpr):
    """How many of ``others`` that are ``live`` and come before each choice are of its expert: in the chunk, and in all before."""
    i = tl.arange(0, CHUNK)
    same = (expert[:, None] == others[None, :]) & (i[None, :] < i[:, None]) & live[None, :]
    return tl.sum(same.to(tl.int32), axis=1) + tl.load(before + expert)
