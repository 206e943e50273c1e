"""Grouped linear layers: each row is multiplied by the matrices of its experts, without a sorted copy of the rows.

One kernel computes both products of an expert. The first product reads rows through ``order``, adds the bias and applies
the activation. The second product reads the results of the first one, adds the bias, multiplies by the weights and
scatters the results to the places of their choices.

Shape letters: N rows, K choices per row, P choices sorted by expert, E experts, T tiles; a tile is up to ``rows`` choices
of one expert. D model dim, F expert width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit.nn.kernels import one_byte, ordered, peers, specialised
from moekit.nn.kernels.activations import ACTIVATIONS, activate
from moekit.nn.kernels.cuts import Blocks, Cut, cut_for, cuts_of, kind_of
from moekit.nn.kernels.one_byte import Layer, numbers, scaled
from moekit.nn.kernels.overlap import overlapped, start, wait
from moekit.nn.kernels.peers import Home, Mailbox
from moekit.nn.kernels.tiles import tiles

if TYPE_CHECKING:
    from moekit.nn.experts import Assignment, Experts


def grouped_ffn(experts: Experts, x: Tensor, assignment: Assignment, cut: Cut | None = None) -> Tensor:
    """Compute :meth:`moekit.nn.experts.Experts.forward`; for inference. ``cut`` is for tuning."""
    order, choices, weights = assignment.order.contiguous(), assignment.choices, assignment.weights
    made = len(order)
    if made == 0 or experts.held == 0:
        return x.new_zeros(len(x) * choices, x.shape[1])
    # Else the results of some choices would not be written.
    assert made == len(x) * choices
    size = assignment.whole or (made, experts.held)
    dims = x.shape[1], experts.width
    cut = cut or cut_for(*size, cuts_of(x.device, kind_of(x.dtype, experts.w1.dtype)), dims)
    weights = None if weights is None else weights.contiguous()
    plan = order, tiles(assignment.counts, made, cut.up.rows)
    x = x.contiguous()
    if cut.up.specialised:
        out = ordered.in_order(x, order, assignment.counts, choices)
        # The first product is done with the rows, and their memory takes the results.
        specialised_ffn(experts, out, plan, weights, cut, out)
    else:
        out = x.new_empty(made, x.shape[1])
        planned_ffn(experts, x, plan, choices, weights, cut, out)
    return out


def specialised_ffn(
    experts: Experts,
    rows: Tensor,
    plan: tuple[Tensor, Tensor],
    weights: Tensor | None,
    cut: Cut,
    out: Tensor,
    home: Home | None = None,
) -> None:
    """Write into ``out`` what :func:`planned_ffn` does, with warps of two kinds (specialised.py).

    Rows come in the order of the plan, and ``out`` may be their memory. Weights come in the order of the plan with a ``home``, else
    by choice.
    """
    hidden = rows.new_empty(len(rows), experts.width)
    up, down = one_byte.layers(experts)
    act = ACTIVATIONS[experts.activation]
    specialised.linear(rows, up, hidden, *plan, None, cut.up, first=True, act=act)
    specialised.linear(hidden, down, out, *plan, weights, cut.down, first=False, act=0, home=home)


def planned_ffn(
    experts: Experts,
    x: Tensor,
    plan: tuple[Tensor, Tensor],
    choices: int,
    weights: Tensor | None,
    cut: Cut,
    out: Tensor,
    home: Home | None = None,
    sorted_rows: bool = False,
) -> None:
    """Write into ``out`` [N K, D] what :func:`grouped_ffn` makes of the choices in the tiles of ``plan``, for inference.

    Args:
        plan: the choices sorted by expert [P], and their tiles (tiles.py).
        home: the choices are of several ranks, and results go to the same place in the memory of their rank.
        sorted_rows: rows and weights come in the order of the plan.
    """
    hidden = x.new_empty(len(plan[0]), experts.width)
    up, down = one_byte.layers(experts)
    act = ACTIVATIONS[experts.activation]
    how = {"sorted_rows": sorted_rows}
    _linear(x, up, hidden, plan, None, choices, cut.up, first=True, act=act, **how)
    _linear(hidden, down, out, plan, weights, choices, cut.down, first=False, act=0, home=home, **how)


def gathered_ffn(
    experts: Experts, box: Mailbox, first: int, rows_expected: int, cut: Cut | None = None
) -> None:
    """Run this rank's experts, from number ``first`` on, on the rows in all mailboxes, and write the results to their ranks.

    It is for inference. No rank brings more than ``rows_expected`` rows.
    """
    if experts.held == 0:
        return
    # About as many choices arrive here as one rank makes.
    cuts = cuts_of(box.x.device, kind_of(box.dtype, experts.w1.dtype))
    cut = cut or cut_for(rows_expected * box.choices, experts.held, cuts, (box.dim, experts.width))
    rows, weights, order, table = peers.gather(box, first, experts.held, rows_expected, cut.up.rows)
    plan, home = (order, table), Home(box.reach, box.rows * box.choices)
    if cut.up.specialised:
        specialised_ffn(experts, rows, plan, weights, cut, box.home, home)
    else:
        planned_ffn(experts, rows, plan, 1, weights, cut, box.home, home, sorted_rows=True)


def _linear(
    x: Tensor,
    layer: Layer,
    out: Tensor,
    plan: tuple[Tensor, Tensor],
    weights: Tensor | None,
    choices: int,
    blocks: Blocks,
    *,
    first: bool,
    act: int,
    sorted_rows: bool,
    home: Home | None = None,
) -> None:
    w, b, scale, options = layer
    held, n, k = w.shape
    order, table = plan
    assert w.is_contiguous() and b.is_contiguous() and out.is_contiguous()
    _grouped_linear[(table.shape[1] * triton.cdiv(n, blocks.columns),)](
        x,
        w,
        b,
        scale,
        out,
        order,
        table,
        weights,
        None if home is None else home.reach,
        table.shape[1],
        held,
        0 if home is None else home.room,
        CHOICES=choices,
        SORTED=sorted_rows,
        HOME=home is not None,
        N=n,
        K=k,
        FIRST=first,
        WEIGHTED=weights is not None,
        ACTIVATION=act,
        EXACT=x.dtype == torch.float32,
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        INNER=blocks.inner,
        SWAPPED=blocks.swapped,
        **options,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        **overlapped(x.device),
    )


# x: [N rows, K] if FIRST, else [P, K] in the order of ``order``.
# w: [E, N, K]; b: [E, N]; scale: [E, N] if ONE_BYTE, else None.
# out: [P, N] in the order of ``order`` if FIRST, else [N K, N] by choice, with zeros for choices of no expert unless HOME.
# order: [P]; table: [3, T], each tile's expert, first index into ``order``, and end.
# weights: [N K] or None; [P] if SORTED. reach: [W] if HOME, see peers.py.
# room: numbers of choices that a rank has, if HOME. N: columns of the output. K: terms of the sum.
# SORTED: rows and weights come in the order of ``order``. HOME: results go to the mailbox of the rank that asked for them.
# SWAPPED: the weights are the left operand of the product, which may be in registers.
@triton.jit(do_not_specialize=["tiles", "experts", "room"])
def _grouped_linear(
    x,
    w,
    b,
    scale,
    out,
    order,
    table,
    weights,
    reach,
    tiles,
    experts,
    room,
    CHOICES: tl.constexpr,
    SORTED: tl.constexpr,
    HOME: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    FIRST: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    SWAPPED: tl.constexpr,
    ONE_BYTE: tl.constexpr,
    PTX: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # The second product starts when all programs of the first one know that the plan is there, so it reads the plan before it
    # waits for the first one.
    if FIRST:
        wait(OVERLAP)
    start(OVERLAP)
    # Neighbouring programs read the same rows of a tile; programs of the next tile read the same matrix of an expert.
    across: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // across
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    expert = tl.load(table + tile, cache_modifier=".cg")
    row = tl.load(table + tiles + tile, cache_modifier=".cg") + tl.arange(0, ROWS)
    live = row < tl.load(table + 2 * tiles + tile, cache_modifier=".cg")
    choice = tl.load(order + row, mask=live, other=0, cache_modifier=".cg")
    if not FIRST:
        wait(OVERLAP)
    if expert < experts:
        source = (choice // CHOICES if FIRST and not SORTED else row).to(tl.int64)

        inner = tl.arange(0, INNER)
        a_at = x + source[:, None] * K + inner[None, :]
        fits = column < N
        matrix = w + expert.to(tl.int64) * (N * K)
        if SWAPPED:
            w_at = matrix + column[:, None] * K + inner[None, :]
            there = fits[:, None]
            total = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
        else:
            w_at = matrix + column[None, :] * K + inner[:, None]
            there = fits[None, :]
            total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for done in range(0, K, INNER):
            if K % INNER == 0:
                a = tl.load(a_at + done, mask=live[:, None], other=0.0)
                m = tl.load(w_at + done, mask=there, other=0)
            else:
                rest = inner < K - done
                a = tl.load(a_at + done, mask=live[:, None] & rest[None, :], other=0.0)
                m = tl.load(w_at + done, mask=there & (rest[None, :] if SWAPPED else rest[:, None]), other=0)
            m = numbers(m, ONE_BYTE, PTX).to(a.dtype)
            if SWAPPED:
                total = tl.dot(m, tl.trans(a), total, input_precision="ieee" if EXACT else "tf32")
            else:
                total = tl.dot(a, m, total, input_precision="ieee" if EXACT else "tf32")
        if SWAPPED:
            total = tl.trans(total)
        if ONE_BYTE:
            total = scaled(
                total, tl.load(scale + expert * N + column, mask=fits, other=0.0)[None, :], ONE_BYTE
            )
        total += tl.load(b + expert * N + column, mask=fits, other=0.0).to(tl.float32)[None, :]
        total = activate(total, ACTIVATION, EXACT)
        if WEIGHTED:
            weight = tl.load(weights + (row if SORTED else choice), mask=live, other=0.0)
            total *= weight.to(tl.float32)[:, None]
        target = (row if FIRST else choice).to(tl.int64) * N
        if HOME:
            far = tl.load(reach + choice // room, mask=live, other=0)
            far = far // (out.dtype.element_ty.primitive_bitwidth // 8)
            # With this hint the compiler stores 16 bytes at a time.
            target = tl.multiple_of(far, 16) + (choice % room).to(tl.int64) * N
        tl.store(
            out + target[:, None] + column[None, :],
            total.to(out.dtype.element_ty),
            mask=live[:, None] & fits[None, :],
        )
    elif not FIRST and not HOME:
        # The choices of this tile are no expert's.
        to = out + choice.to(tl.int64)[:, None] * N + column[None, :]
        nothing = tl.zeros((ROWS, COLUMNS), out.dtype.element_ty)
        tl.store(to, nothing, mask=live[:, None] & (column < N)[None, :])
