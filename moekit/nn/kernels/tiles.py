"""Which places a program of the grouped product computes, decided on the device.

Shape letters: P places (choices of tokens), E experts, T tiles; a tile is up to ``rows`` places of one expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit.nn import gate

FEW = 128  # places that are compared with one another, which is one kernel, in place of being sorted


def by_expert(routing: gate.Routing, experts: int) -> tuple[Tensor, Tensor]:
    """:func:`moekit.nn.gate.by_expert`."""
    places = routing.experts.numel()
    if not 0 < places <= FEW:
        return gate.by_expert(routing, experts)
    order = torch.empty(places, dtype=torch.long, device=routing.experts.device)
    counts = torch.empty(experts, dtype=torch.long, device=order.device)
    _by_expert[(max(places, experts),)](
        routing.experts.contiguous(),
        routing.kept.contiguous(),
        order,
        counts,
        places,
        experts,
        PLACES=max(16, triton.next_power_of_2(places)),
        num_warps=1,
    )
    return order, counts


@triton.jit(do_not_specialize=["places", "experts"])
def _by_expert(chosen, kept, order, counts, places, experts, PLACES: tl.constexpr):
    """Each program finds where one place comes, and how many places one expert has."""
    me = tl.program_id(0)
    i = tl.arange(0, PLACES)
    there = i < places
    expert = tl.load(chosen + i, mask=there, other=0).to(tl.int32)
    expert = tl.where(tl.load(kept + i, mask=there, other=0) != 0, expert, experts)
    expert = tl.where(there, expert, experts + 1)
    if me < experts:
        tl.store(counts + me, tl.sum((expert == me).to(tl.int32), axis=0).to(tl.int64))
    if me < places:
        mine = tl.sum(tl.where(i == me, expert, 0), axis=0)
        before = (expert < mine) | ((expert == mine) & (i < me))
        tl.store(order + tl.sum(before.to(tl.int32), axis=0), me.to(tl.int64))


def most_tiles(places: int, experts: int, rows: int) -> int:
    """The tiles that ``places`` places can need at most: each expert that has any leaves one tile unfilled."""
    return min(places, places // rows + min(experts, places))


def tiles(counts: Tensor, places: int, rows: int) -> Tensor:
    """The tiles of places sorted by expert.

    Args:
        counts: [E] int64, places of each expert; they sum to ``places`` at most.

    Returns:
        [3, T] int32: each tile's expert, its first place and the one behind its last; E, 0, 0 for those not needed.
    """
    experts = len(counts)
    table = torch.empty(3, most_tiles(places, experts, rows), dtype=torch.int32, device=counts.device)
    _tiles[(experts + 1,)](
        counts.contiguous(),
        table,
        experts,
        table.shape[1],
        ROWS=rows,
        EXPERTS=triton.next_power_of_2(experts),
        num_warps=4,
    )
    return table


@triton.jit(do_not_specialize=["experts", "width"])
def _tiles(counts, table, experts, width, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Each program writes one expert's tiles, the last one those that are not needed."""
    mine = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    count = tl.load(counts + expert, mask=expert < experts, other=0).to(tl.int32)
    before = expert < mine
    place = tl.sum(tl.where(before, count, 0), axis=0)
    tile = tl.sum(tl.where(before, (count + ROWS - 1) // ROWS, 0), axis=0)
    own = tl.sum(tl.where(expert == mine, count, 0), axis=0)
    end = place + own
    last = tl.where(mine == experts, width, tile + (own + ROWS - 1) // ROWS)
    for start in range(tile, last, 64):
        at = start + tl.arange(0, 64)
        here = at < last
        first = place + (at - tile) * ROWS
        tl.store(table + at, tl.zeros_like(at) + mine, mask=here)
        tl.store(table + width + at, tl.where(mine == experts, 0, first), mask=here)
        tl.store(
            table + 2 * width + at, tl.where(mine == experts, 0, tl.minimum(first + ROWS, end)), mask=here
        )
