"""A MoE layer of up to 64 rows a rank over several ranks; where it does not fit, short_peers.py is for a few, peers.py for any.

The steps are those of peers.py, but no kernel only waits, and rows are written to the ranks of their experts and not read
from there, since a write does not wait for its way to the peer and back:

    send      a program for each row makes the gate's choice, writes the row to the ranks of its experts and the choice to
              all ranks, and signals
    plan      each program waits for the signals of all ranks; then the choices of all ranks are sorted and have their tiles
    experts   both products of grouped.py; the second one writes each weighted result to the rank of the choice
    collect   the next norm signals, waits until all results have arrived, and adds them up

No rank overwrites what a peer may still read, since a rank waits twice in a layer. It sends the rows of the next layer after
its own norm, which has waited for the norms of all ranks, and these come after all products of this layer. It writes results
after it has the rows of all ranks, and a rank sends its rows after the norm that read the results of the layer before.

Shape letters: W ranks, M the most rows that a rank brings, B rows that this rank brings, K choices per row, P = W M K
choices of all ranks, E experts in all, e experts held here, T tiles, D model dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from moekit.nn.kernels.cuts import cut_for, cuts_of, kind_of
from moekit.nn.kernels.gate import chooses, top
from moekit.nn.kernels.grouped import planned_ffn
from moekit.nn.kernels.norm import normalised, with_parts
from moekit.nn.kernels.overlap import overlapped, start, wait
from moekit.nn.kernels.peer_dispatch import PeerDispatch
from moekit.nn.kernels.peers import WRITTEN, Home, Mailbox, signal, until
from moekit.nn.kernels.tiles import most_tiles, write_tiles
from moekit.nn.transformer import MoE


@dataclass(frozen=True)
class Coming:
    """The weighted outputs of the experts for ``rows`` rows of this rank, which peers still write to ``box.home``.

    Each one is followed by :func:`collected` or :func:`arrived`.
    """

    box: Mailbox
    rows: int


def fits(moe: MoE, rows: int) -> bool:
    """Whether :func:`sent` supports this layer, where no rank brings more than ``rows`` rows."""
    return isinstance(moe.dispatch, PeerDispatch) and chooses(moe.rule) and rows <= WRITTEN


def sent(moe: MoE, logits: Tensor, x: Tensor, most: int) -> Coming:
    """Have the chosen experts of all ranks compute, wherever they are; for inference.

    It is a collective of the ranks. B may be 0.

    Args:
        logits: [B, E], the logits of the gate.
        x: [B, D], the inputs of the experts.
        most: M, the most rows of any rank.
    """
    experts, dispatch, choices = moe.experts, moe.dispatch, moe.rule.top_k
    (rows, dim), device, held = x.shape, x.device, experts.held
    box = dispatch.mailbox(most)
    kind = torch.float32 if moe.config.gate_fp32 else logits.dtype
    _send[(most,)](
        logits, x, moe.numbers, box.all_chosen, box.all_weights, box.all_x, box.flags, box.reach, box.times,
        rows, box.rank, torch.finfo(kind).eps,
        E=box.experts, K=choices, D=dim, MOST=most, EXPERTS=triton.next_power_of_2(box.experts),
        BLOCK=triton.next_power_of_2(dim), HALF=kind == torch.float16, BRAIN=kind == torch.bfloat16,
        W=box.world_size, RANKS=box.ways["RANKS"], num_warps=1 if box.experts <= 512 else 4, **overlapped(device),
    )  # fmt: skip
    if held:
        places = box.world_size * most * choices
        # About as many choices arrive here as one rank makes.
        cut = cut_for(most * choices, held, cuts_of(device, kind_of(x.dtype, experts.w1.dtype)))
        order = torch.empty(places, dtype=torch.int32, device=device)
        table = torch.empty(3, most_tiles(places, held, cut.up.rows), dtype=torch.int32, device=device)
        _meet_and_plan[(held + 1,)](
            box.all_chosen, order, table, box.flags, box.times, box.gave_up, dispatch.first, held, table.shape[1], box.limit,
            PLACES=places, ROWS=cut.up.rows, EXPERTS=triton.next_power_of_2(held), BLOCK=triton.next_power_of_2(places),
            num_warps=4, **box.ways, **overlapped(device),
        )  # fmt: skip
        home = Home(box.reach, most * choices)
        planned_ffn(experts, box.all_x, (order, table), choices, box.all_weights, cut, box.home, home)
    return Coming(box, rows)


def collected(coming: Coming, x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Wait for what comes, add it to x [B, D], and normalise: the sum and its norm, [B, D] each. B is not 0."""
    box, (rows, dim) = coming.box, x.shape
    assert rows == coming.rows > 0
    total, normed = torch.empty_like(x), torch.empty_like(x)
    _collect_norm[(rows,)](
        x, box.home, norm.weight, norm.bias, total, normed, norm.eps,
        box.flags, box.reach, box.times, box.gave_up, box.rank, box.limit,
        K=box.choices, D=dim, BLOCK=triton.next_power_of_2(dim), num_warps=4, **box.ways, **overlapped(x.device),
    )  # fmt: skip
    return total, normed


def arrived(coming: Coming) -> Tensor:
    """Wait for what comes, [B, K, D]."""
    box = coming.box
    _meet_home[(1,)](
        box.flags, box.reach, box.times, box.gave_up, box.rank, box.limit,
        num_warps=1, **box.ways, **overlapped(box.home.device),
    )  # fmt: skip
    return box.home[: coming.rows]


# logits [B, E]; x [B, D]; numbers [E] or None, see MoE. chosen, weights and x_out are those of the mailbox for all ranks.
# In a layer a rank signals M + 1 times, M times here, and ``times`` counts all of them from here on.
@triton.jit(do_not_specialize=["rows", "rank"])
def _send(
    logits, x, numbers, chosen, weights, x_out, flags, reach, times, rows, rank, eps,
    E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, MOST: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
    HALF: tl.constexpr, BRAIN: tl.constexpr, W: tl.constexpr, RANKS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start(OVERLAP)
    kind: tl.constexpr = x_out.dtype.element_ty
    peer = tl.arange(0, RANKS)
    there = peer < W
    everywhere = tl.load(reach + peer, mask=there, other=0) // 4
    row = tl.program_id(0)
    live = row < rows
    expert = tl.arange(0, EXPERTS)
    column = tl.arange(0, BLOCK)
    here = (column < D) & live
    wait(OVERLAP)
    real = (expert < E)[None, :]
    scores = tl.load(logits + row * E + expert[None, :], mask=real & live, other=float("-inf")).to(tl.float32)
    mine = tl.load(x + row * D + column, mask=here, other=0.0)
    # A program without a row chooses, too, but nothing comes of it.
    scores = tl.where(real & (row >= rows), 0.0, scores)
    _, first, second, _, _, one, two = top(scores, eps, E, K, HALF, BRAIN)
    place = rank * MOST + row
    for k in tl.static_range(K):
        choice, weight = first, one
        if k == 1:
            choice, weight = second, two
        if numbers is not None:
            choice = tl.load(numbers + choice).to(tl.int32)
        # The rank that holds the expert, see ``owned`` in moekit/nn/dispatch.py.
        owner = tl.max(((choice + 1) * W - 1) // E, axis=0)
        far = tl.multiple_of(tl.load(reach + owner), 256) // (kind.primitive_bitwidth // 8)
        tl.store(x_out + far + place * D + column, mine, mask=here)
        at = everywhere + place * K + k
        tl.store(chosen + at, tl.where(live, choice, E) + tl.zeros_like(peer), mask=there)
        # The experts' outputs are multiplied by weights of the model's type.
        weight = weight.to(kind).to(tl.float32)
        tl.store(weights + at, weight + tl.zeros((RANKS,), dtype=tl.float32), mask=there)
    tl.debug_barrier()
    tl.atomic_add(flags + everywhere + rank, tl.zeros_like(peer) + 1, mask=there, sem="release", scope="sys")
    if row == 0:
        tl.store(times, tl.load(times) + MOST + 1)


# chosen: those of all ranks, PLACES of them. order [P] int32; table [3, T] as in tiles.py.
@triton.jit(do_not_specialize=["first", "held", "width", "limit"])
def _meet_and_plan(
    chosen, order, table, flags, times, gave_up, first, held, width, limit,
    PLACES: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
    W: tl.constexpr, RANKS: tl.constexpr, TIMED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write the choices of one expert in their order, and their tiles, per program; the last one has the tiles without choices."""
    start(OVERLAP)
    wait(OVERLAP)
    # One signal of the layer is still to come.
    until(flags, tl.load(times) - 1, gave_up, limit, W, RANKS, TIMED)
    place = tl.arange(0, BLOCK)
    there = place < PLACES
    # Peers wrote these values while this kernel ran, so the loads bypass the cache of the multiprocessor.
    expert = tl.load(chosen + place, mask=there, other=-1, volatile=True) - first
    real = there & (expert >= 0) & (expert < held)
    count = tl.histogram(tl.where(real, expert, 0), EXPERTS, mask=real)
    position = write_tiles(table, count, 0, held, width, ROWS, EXPERTS)
    own = real & (expert == tl.program_id(0))
    tl.store(order + position + tl.cumsum(own.to(tl.int32), axis=0) - 1, place, mask=own)


# x, total and normed [B, D], a row per program; home [M, K, D]; weight and bias [D].
@triton.jit(do_not_specialize=["rank", "limit"])
def _collect_norm(
    x, home, weight, bias, total, normed, eps, flags, reach, times, gave_up, rank, limit,
    K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    W: tl.constexpr, RANKS: tl.constexpr, TIMED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start(OVERLAP)
    kind: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0) + tl.arange(0, 1)
    column = tl.arange(0, BLOCK)
    real = column < D
    here = real[None, :]
    at = row[:, None] * D + column[None, :]
    # No kernel writes the norm's weights, so they are read before the wait for earlier kernels.
    w = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=real, other=0.0).to(tl.float32)
    wait(OVERLAP)
    now = tl.load(times)
    if tl.program_id(0) == 0:
        # This rank's products are complete: the results that they wrote to the peers can be read.
        signal(flags, reach, now, rank, W, RANKS)
    mine = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    until(flags, now, gave_up, limit, W, RANKS, TIMED)
    mine = with_parts(mine, home, row, column, here, K, D, kind, FRESH=True)
    tl.store(total + at, mine, mask=here)
    tl.store(normed + at, normalised(mine.to(tl.float32), w, b, real, D, eps).to(kind), mask=here)


@triton.jit(do_not_specialize=["rank", "limit"])
def _meet_home(
    flags, reach, times, gave_up, rank, limit,
    W: tl.constexpr, RANKS: tl.constexpr, TIMED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start(OVERLAP)
    wait(OVERLAP)
    now = tl.load(times)
    signal(flags, reach, now, rank, W, RANKS)
    until(flags, now, gave_up, limit, W, RANKS, TIMED)
