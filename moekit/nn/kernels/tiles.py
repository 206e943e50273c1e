"""The tiles of the grouped product, computed on the device: each tells a program which choices to compute.

Shape letters: P choices of tokens, E experts, T tiles; a tile is up to ``rows`` choices of one expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit.nn import gate
from moekit.nn.kernels.counting import sort_by_expert
from moekit.nn.kernels.overlap import overlapped, start, wait

# Up to this number, one kernel compares all choices with one another instead of sorting them.
FEW = 128


def by_expert(routing: gate.Routing, experts: int) -> tuple[Tensor, Tensor]:
    """Compute :func:`moekit.nn.gate.by_expert`."""
    choices = routing.experts.numel()
    if choices > FEW:
        return sort_by_expert(routing.experts.flatten(), routing.kept.flatten(), experts)
    if choices == 0:
        return gate.by_expert(routing, experts)
    order = torch.empty(choices, dtype=torch.long, device=routing.experts.device)
    counts = torch.empty(experts, dtype=torch.long, device=order.device)
    _by_expert[(max(choices, experts),)](
        routing.experts.contiguous(),
        routing.kept.contiguous(),
        order,
        counts,
        choices,
        experts,
        CHOICES=max(16, triton.next_power_of_2(choices)),
        num_warps=1,
    )
    return order, counts


@triton.jit(do_not_specialize=["choices", "experts"])
def _by_expert(chosen, kept, order, counts, choices, experts, CHOICES: tl.constexpr):
    """Find the position of one choice in the order, and the number of choices of one expert, per program."""
    me = tl.program_id(0)
    i = tl.arange(0, CHOICES)
    there = i < choices
    expert = tl.load(chosen + i, mask=there, other=0).to(tl.int32)
    expert = tl.where(tl.load(kept + i, mask=there, other=0) != 0, expert, experts)
    expert = tl.where(there, expert, experts + 1)
    if me < experts:
        tl.store(counts + me, tl.sum((expert == me).to(tl.int32), axis=0).to(tl.int64))
    if me < choices:
        mine = tl.sum(tl.where(i == me, expert, 0), axis=0)
        before = (expert < mine) | ((expert == mine) & (i < me))
        tl.store(order + tl.sum(before.to(tl.int32), axis=0), me.to(tl.int64))


def most_tiles(choices: int, experts: int, rows: int) -> int:
    """The most tiles that ``choices`` choices need: each expert, and none, may have one tile that is not full."""
    return min(choices, choices // rows + min(experts + 1, choices))


def tiles(counts: Tensor, choices: int, rows: int) -> Tensor:
    """The tiles of choices sorted by expert.

    Args:
        counts: [E] int64, choices of each expert; their sum is at most ``choices``.

    Returns:
        [3, T] int32: the expert of each tile, the index in the order of its first choice, and the index after its last
        choice. Tiles of choices of no expert come after the others, with E; E, 0, 0 for tiles that are not needed.
    """
    experts = len(counts)
    table = torch.empty(3, most_tiles(choices, experts, rows), dtype=torch.int32, device=counts.device)
    _tiles[(experts + 1,)](
        counts.contiguous(),
        table,
        choices,
        experts,
        table.shape[1],
        ROWS=rows,
        EXPERTS=triton.next_power_of_2(experts),
        num_warps=4,
    )
    return table


@triton.jit(do_not_specialize=["choices", "experts", "width"])
def _tiles(counts, table, choices, experts, width, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    expert = tl.arange(0, EXPERTS)
    count = tl.load(counts + expert, mask=expert < experts, other=0).to(tl.int32)
    write_tiles(table, count, choices, experts, width, ROWS, EXPERTS)


@triton.jit
def write_tiles(table, count, choices, experts, width, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Write the tiles of one expert per program; the program after the last expert writes those of no expert, and those not needed.

    Returns the index in the order of the expert's first choice. ``count`` [EXPERTS] is the number of choices of each; those of
    no expert come after them, up to ``choices``, and there are none if that is 0.
    """
    mine = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    before = expert < mine
    position = tl.sum(tl.where(before, count, 0), axis=0)
    tile = tl.sum(tl.where(before, (count + ROWS - 1) // ROWS, 0), axis=0)
    own = tl.sum(tl.where(expert == mine, count, 0), axis=0)
    end = tl.where(mine == experts, choices, position + own)
    last = tl.where(mine == experts, width, tile + (own + ROWS - 1) // ROWS)
    for done in range(tile, last, 64):
        at = done + tl.arange(0, 64)
        here = at < last
        first = position + (at - tile) * ROWS
        needed = first < end
        tl.store(table + at, tl.zeros_like(at) + mine, mask=here)
        tl.store(table + width + at, tl.where(needed, first, 0), mask=here)
        tl.store(table + 2 * width + at, tl.where(needed, tl.minimum(first + ROWS, end), 0), mask=here)
    return position


def planned(
    chosen: Tensor, weights: Tensor, experts: int, rows: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort a few choices by expert, make their tiles and round their weights, in one kernel; for inference.

    Args:
        chosen: [N, K] int64; N K is at most :data:`FEW`.
        weights: [N, K].
        rows: the most choices of a tile.

    Returns:
        The choices sorted by expert, [P] int64; their tiles, [3, P] as in :func:`tiles`, but not sorted; and their weights, [P].
    """
    choices = chosen.numel()
    assert 0 < choices <= FEW and chosen.is_contiguous() and weights.is_contiguous()
    order = torch.empty(choices, dtype=torch.long, device=chosen.device)
    rounded = torch.empty(choices, dtype=dtype, device=chosen.device)
    table = torch.empty(3, choices, dtype=torch.int32, device=chosen.device)
    _planned[(choices,)](
        chosen,
        weights,
        order,
        rounded,
        table,
        choices,
        experts,
        CHOICES=max(16, triton.next_power_of_2(choices)),
        ROWS=rows,
        num_warps=1,
        **overlapped(chosen.device),
    )
    return order, table, rounded


# chosen, weights, order and rounded [choices]; table [3, choices].
@triton.jit(do_not_specialize=["choices", "experts"])
def _planned(
    chosen,
    weights,
    order,
    rounded,
    table,
    choices,
    experts,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Find the position of one choice in the order per program, and write a tile if the choice is the first one of a tile."""
    start(OVERLAP)
    wait(OVERLAP)
    me = tl.program_id(0)
    i = tl.arange(0, CHOICES)
    expert = tl.load(chosen + i, mask=i < choices, other=experts).to(tl.int32)
    mine = tl.load(chosen + me).to(tl.int32)
    tl.store(rounded + me, tl.load(weights + me).to(rounded.dtype.element_ty))
    # The place of the choice among those of its expert, and of its expert's first choice among all.
    place = tl.sum(((expert == mine) & (i < me)).to(tl.int32), axis=0)
    begin = tl.sum((expert < mine).to(tl.int32), axis=0)
    end = begin + tl.sum((expert == mine).to(tl.int32), axis=0)
    at = begin + place
    tl.store(order + at, me.to(tl.int64))
    first = place % ROWS == 0
    tl.store(table + me, tl.where(first, mine, experts))
    tl.store(table + choices + me, tl.where(first, at, 0))
    tl.store(table + 2 * choices + me, tl.where(first, tl.minimum(at + ROWS, end), 0))
