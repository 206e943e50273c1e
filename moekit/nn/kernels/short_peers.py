"""A MoE layer of a few rows over several ranks; ``vectors.experts_linear`` is the same for one rank.

It has four kernels. The first one makes the gate's choice and writes it, with the rows, into the buffers of all ranks: a
write does not wait for its way to the peer and back, as a read does. The next two compute both products and write results
to the peers. The last one adds up the results. The first and the last kernel also wait for the peers, so no separate kernel
is needed for that.

Shape letters: W ranks, M the most rows that a rank brings, B rows that this rank brings, K choices per row, P = W M K
choices of all ranks, E experts in all, D model dim, F expert width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit.nn.experts import Experts
from moekit.nn.kernels import one_byte
from moekit.nn.kernels.activations import ACTIVATIONS, activate
from moekit.nn.kernels.gate import top
from moekit.nn.kernels.one_byte import numbers, scaled
from moekit.nn.kernels.overlap import overlapped, start, wait
from moekit.nn.kernels.peers import Mailbox, wait_for_peers
from moekit.nn.kernels.vectors import LONGEST, WARPS, columns_of


def experts_linear(
    experts: Experts, box: Mailbox, first: int, most: int, logits: Tensor, x: Tensor, onto: Tensor, fp32: bool
) -> Tensor:
    """Add the weighted outputs of the chosen experts of all ranks to ``onto``; for inference.

    It is a collective of the ranks of ``box``. B may be 0.

    Args:
        experts: the experts held here, from number ``first`` on.
        most: M, the most rows of any rank.
        logits: [B, E], the logits of the gate.
        x: [B, D], the inputs of the experts.
        onto: [B, D], the residual stream.
        fp32: whether the gate computes in float32.

    Returns:
        [B, D], the sum.
    """
    rows, dim = x.shape
    held, width = experts.held, experts.width
    up, down = one_byte.layers(experts)
    choices, device, exact = box.choices, x.device, x.dtype == torch.float32
    places = box.world_size * most * choices
    hidden = torch.empty(places, width, dtype=x.dtype, device=device)
    out = torch.empty_like(onto)
    padded = triton.next_power_of_2(most)
    kind = torch.float32 if fp32 else logits.dtype
    _hand_out[(1,)](
        logits, x, box.all_chosen, box.all_weights, box.all_x, box.flags, box.reach, box.times, box.gave_up,
        rows, box.rank, box.limit, torch.finfo(kind).eps,
        E=box.experts, K=choices, D=dim, MOST=most, ROWS=padded, EXPERTS=triton.next_power_of_2(box.experts),
        BLOCK=triton.next_power_of_2(dim), HALF=kind == torch.float16, BRAIN=kind == torch.bfloat16,
        num_warps=WARPS, **box.ways, **overlapped(device),
    )  # fmt: skip
    if held:
        inner = min(triton.next_power_of_2(dim), LONGEST)
        columns = columns_of(width, inner, device, most * choices)
        _up[(triton.cdiv(width, columns), places)](
            box.all_x, up.weights, up.bias, up.scale, box.all_chosen, hidden, first, held,
            K=choices, N=width, D=dim, ACTIVATION=ACTIVATIONS[experts.activation], EXACT=exact,
            COLUMNS=columns, INNER=inner, num_warps=WARPS, **up.options, **overlapped(device),
        )  # fmt: skip
        inner = min(triton.next_power_of_2(width), LONGEST)
        columns = columns_of(dim, inner, device, most * choices)
        _down[(triton.cdiv(dim, columns), places)](
            hidden, down.weights, down.bias, down.scale, box.all_chosen, box.all_weights, box.reach, box.home, first, held,
            ROOM=most * choices, N=dim, D=width, COLUMNS=columns, INNER=inner, num_warps=WARPS,
            **down.options, **overlapped(device),
        )  # fmt: skip
    _collect[(1,)](
        box.home, onto, out, box.flags, box.reach, box.times, box.gave_up, rows, box.rank, box.limit,
        K=choices, D=dim, ROWS=padded, BLOCK=triton.next_power_of_2(dim), num_warps=WARPS, **box.ways, **overlapped(device),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows", "rank", "limit"])
def _hand_out(
    logits, x, chosen, weights, x_out, flags, reach, times, gave_up, rows, rank, limit, eps,
    E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr, W: tl.constexpr, RANKS: tl.constexpr, TIMED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    start(OVERLAP)
    wait(OVERLAP)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    here = (row < rows)[:, None] & (column < D)[None, :]
    at = row[:, None] * D + column[None, :]
    mine = tl.load(x + at, mask=here, other=0.0)
    expert = tl.arange(0, EXPERTS)
    real = (row < rows)[:, None] & (expert < E)[None, :]
    scores = tl.load(logits + row[:, None] * E + expert[None, :], mask=real, other=float("-inf")).to(
        tl.float32
    )
    scores = tl.where((expert < E)[None, :] & (row >= rows)[:, None], 0.0, scores)
    _, first, second, _, _, one, two = top(scores, eps, E, K, HALF, BRAIN)
    there = row < MOST
    first, second = tl.where(row < rows, first, E), tl.where(row < rows, second, E)
    own = rank.to(tl.int64) * MOST
    choice = own * K + row * K
    for peer in tl.static_range(W):
        far = tl.multiple_of(tl.load(reach + peer), 256)
        tl.store(
            x_out + far // (x_out.dtype.element_ty.primitive_bitwidth // 8) + own * D + at, mine, mask=here
        )
        tl.store(chosen + far // 4 + choice, first, mask=there)
        tl.store(weights + far // 4 + choice, one, mask=there)
        if K == 2:
            tl.store(chosen + far // 4 + choice + 1, second, mask=there)
            tl.store(weights + far // 4 + choice + 1, two, mask=there)
    wait_for_peers(flags, reach, times, gave_up, rank, limit, W, RANKS, TIMED)


@triton.jit(do_not_specialize=["first", "held"])
def _up(
    x, w, b, scale, chosen, out, first, held,
    K: tl.constexpr, N: tl.constexpr, D: tl.constexpr, ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, ONE_BYTE: tl.constexpr, PTX: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    start(OVERLAP)
    place = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    fits = column < N
    inner = tl.arange(0, INNER)
    wait(OVERLAP)
    # Peers wrote these values, so the loads bypass the cache of the multiprocessor.
    expert = (tl.load(chosen + place, volatile=True) - first).to(tl.int64)
    if (expert >= 0) & (expert < held):
        w_at = w + expert * (N * D) + column[:, None] * D + inner[None, :]
        a_at = x + (place // K) * D + inner
        products = tl.zeros((COLUMNS, INNER), dtype=tl.float32)
        for done in tl.static_range(0, D, INNER):
            rest = inner < D - done
            m = tl.load(w_at + done, mask=fits[:, None] & rest[None, :], other=0)
            m = numbers(m, ONE_BYTE, PTX).to(tl.float32)
            a = tl.load(a_at + done, mask=rest, other=0.0, volatile=True).to(tl.float32)
            products += m * a[None, :]
        total = tl.sum(products, axis=1)
        if ONE_BYTE:
            total = scaled(total, tl.load(scale + expert * N + column, mask=fits, other=0.0), ONE_BYTE)
        total += tl.load(b + expert * N + column, mask=fits, other=0.0).to(tl.float32)
        total = activate(total, ACTIVATION, EXACT)
        tl.store(out + place * N + column, total.to(out.dtype.element_ty), mask=fits)


@triton.jit(do_not_specialize=["first", "held"])
def _down(
    x, w, b, scale, chosen, weights, reach, home, first, held,
    ROOM: tl.constexpr, N: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    ONE_BYTE: tl.constexpr, PTX: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start(OVERLAP)
    kind: tl.constexpr = home.dtype.element_ty
    place = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    fits = column < N
    inner = tl.arange(0, INNER)
    far = tl.multiple_of(tl.load(reach + place // ROOM), 256)
    own = place % ROOM
    wait(OVERLAP)
    expert = (tl.load(chosen + place, volatile=True) - first).to(tl.int64)
    if (expert >= 0) & (expert < held):
        w_at = w + expert * (N * D) + column[:, None] * D + inner[None, :]
        products = tl.zeros((COLUMNS, INNER), dtype=tl.float32)
        for done in tl.static_range(0, D, INNER):
            rest = inner < D - done
            m = tl.load(w_at + done, mask=fits[:, None] & rest[None, :], other=0)
            m = numbers(m, ONE_BYTE, PTX).to(tl.float32)
            a = tl.load(x + place * D + inner + done, mask=rest, other=0.0).to(tl.float32)
            products += m * a[None, :]
        total = tl.sum(products, axis=1)
        if ONE_BYTE:
            total = scaled(total, tl.load(scale + expert * N + column, mask=fits, other=0.0), ONE_BYTE)
        total += tl.load(b + expert * N + column, mask=fits, other=0.0).to(tl.float32)
        total *= tl.load(weights + place, volatile=True).to(kind).to(tl.float32)
        at = far // (kind.primitive_bitwidth // 8) + own * N + column
        tl.store(home + at, total.to(kind), mask=fits)


@triton.jit(do_not_specialize=["rows", "rank", "limit"])
def _collect(
    home, onto, out, flags, reach, times, gave_up, rows, rank, limit,
    K: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, W: tl.constexpr, RANKS: tl.constexpr, TIMED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    start(OVERLAP)
    wait(OVERLAP)
    kind: tl.constexpr = out.dtype.element_ty
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    here = (row < rows)[:, None] & (column < D)[None, :]
    at = row[:, None] * D + column[None, :]
    before = tl.load(onto + at, mask=here, other=0.0).to(tl.float32)
    wait_for_peers(flags, reach, times, gave_up, rank, limit, W, RANKS, TIMED)
    part = row[:, None] * (K * D) + column[None, :]
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for k in tl.static_range(K):
        # A peer wrote this value, so the load bypasses the cache of the multiprocessor.
        total += tl.load(home + part + k * D, mask=here, other=0.0, volatile=True).to(tl.float32)
    tl.store(out + at, (before + total.to(kind).to(tl.float32)).to(kind), mask=here)
