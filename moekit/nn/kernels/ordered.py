"""Rows of tokens in the order of their choices, and zeros for choices of no expert: what specialised.py needs beside its products.

Shape letters: N rows, K choices per row, P choices sorted by expert, E experts, D model dim.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Programs that clear; each takes any number of rows.
PROGRAMS = 256


def in_order(x: Tensor, order: Tensor, counts: Tensor, choices: int) -> Tensor:
    """[P, D], the row of each choice in the order of ``order``; rows of choices of no expert are not written."""
    found = x.new_empty(len(order), x.shape[1])
    _launch(_in_order, 4, triton.cdiv(len(order), 4), x, order, counts, found, CHOICES=choices)
    return found


def clear(out: Tensor, order: Tensor, counts: Tensor) -> None:
    """Write zeros to the results in ``out`` [P, D] of choices of no expert."""
    _launch(_clear, 16, PROGRAMS, out, order, counts)


def _launch(
    kernel,
    rows: int,
    programs: int,
    wide: Tensor,
    order: Tensor,
    counts: Tensor,
    *to: Tensor,
    **options: int,
) -> None:
    kernel[(programs,)](
        wide,
        order,
        counts,
        *to,
        len(order),
        len(counts),
        D=wide.shape[1],
        ROWS=rows,
        BLOCK=triton.next_power_of_2(wide.shape[1]),
        EXPERTS=triton.next_power_of_2(len(counts)),
        **options,
    )


@triton.jit(do_not_specialize=["made", "experts"])
def _in_order(
    x,
    order,
    counts,
    found,
    made,
    experts,
    CHOICES: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    assigned = place < _assigned(counts, experts, EXPERTS)
    choice = tl.load(order + place, mask=assigned, other=0)
    column = tl.arange(0, BLOCK)
    live = assigned[:, None] & (column < D)[None, :]
    row = tl.load(x + (choice // CHOICES)[:, None] * D + column[None, :], mask=live)
    tl.store(found + place[:, None] * D + column[None, :], row, mask=live)


@triton.jit(do_not_specialize=["made", "experts"])
def _clear(
    out,
    order,
    counts,
    made,
    experts,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    zeros = tl.zeros((ROWS, BLOCK), out.dtype.element_ty)
    # Mostly there are few or none.
    first = _assigned(counts, experts, EXPERTS).to(tl.int32) + tl.program_id(0) * ROWS
    for begin in range(first, made, tl.num_programs(0) * ROWS):
        place = begin + tl.arange(0, ROWS)
        choice = tl.load(order + place, mask=place < made, other=0)
        live = (place < made)[:, None] & (column < D)[None, :]
        tl.store(out + choice[:, None] * D + column[None, :], zeros, mask=live)


@triton.jit
def _assigned(counts, experts, EXPERTS: tl.constexpr):
    """The number of choices that are an expert's. They come first in the order."""
    expert = tl.arange(0, EXPERTS)
    return tl.sum(tl.load(counts + expert, mask=expert < experts, other=0), axis=0)
