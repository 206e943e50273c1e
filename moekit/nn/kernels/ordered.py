"""Rows of tokens in the order of their choices, which specialised.py needs before its products.

Shape letters: N rows, K choices per row, P choices sorted by expert, E experts, D model dim.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Choices of a program.
ROWS = 4


def in_order(x: Tensor, order: Tensor, counts: Tensor, choices: int) -> Tensor:
    """[P, D], the row of each choice in the order of ``order``; rows of choices of no expert are not written."""
    found = x.new_empty(len(order), x.shape[1])
    _in_order[(triton.cdiv(len(order), ROWS),)](
        x,
        order,
        counts,
        found,
        len(counts),
        CHOICES=choices,
        D=x.shape[1],
        ROWS=ROWS,
        BLOCK=triton.next_power_of_2(x.shape[1]),
        EXPERTS=triton.next_power_of_2(len(counts)),
    )
    return found


@triton.jit(do_not_specialize=["experts"])
def _in_order(
    x,
    order,
    counts,
    found,
    experts,
    CHOICES: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # The choices that are an expert's come first in the order.
    expert = tl.arange(0, EXPERTS)
    assigned = place < tl.sum(tl.load(counts + expert, mask=expert < experts, other=0), axis=0)
    choice = tl.load(order + place, mask=assigned, other=0)
    column = tl.arange(0, BLOCK)
    live = assigned[:, None] & (column < D)[None, :]
    row = tl.load(x + (choice // CHOICES)[:, None] * D + column[None, :], mask=live)
    tl.store(found + place[:, None] * D + column[None, :], row, mask=live)
