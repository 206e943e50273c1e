"""Grouped linear layers of many rows an expert, with specialised warps, for Hopper: one warp loads, two teams multiply.

The kernel computes what the kernel of grouped.py computes, from rows in the order of the choices. A program stays for many
tiles. Its loader lets the copy engine fill a ring of blocks in shared memory, ahead of the teams and across tiles. The teams
have one tile each and take turns: while one multiplies, the other one is at its bias, activation and stores.

Shape letters: N rows, K choices per row, P choices sorted by expert, E experts, T tiles. D model dim, F expert width.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moekit.nn.kernels.activations import activate as _activate
from moekit.nn.kernels.cuts import Blocks
from moekit.nn.kernels.gpu import multiprocessors
from moekit.nn.kernels.one_byte import Layer
from moekit.nn.kernels.peers import Home

activate = gluon.jit(_activate.fn)
# The turns of the kernel are those of two teams.
TEAMS = gl.constexpr(2)
# The registers of a multiprocessor, and those that a thread of the loader keeps.
ALL_REGISTERS, LOADER_REGISTERS = 65_536, gl.constexpr(24)


def linear(
    x: Tensor,
    layer: Layer,
    out: Tensor,
    order: Tensor | None,
    table: Tensor | None,
    weights: Tensor | None,
    blocks: Blocks,
    *,
    first: bool,
    act: int,
    home: Home | None = None,
) -> None:
    """Launch the kernel.

    ``x`` has a row for each place in ``order``, in both products. Without a table all rows are the only expert's, in their own order.
    With a ``home``, the choices are of several ranks, and the second product writes each result into the memory of its rank.
    """
    w, b, _, _ = layer
    held, n, k = w.shape
    # Else the loading warp and the teams would count different blocks, and wait for one another.
    assert n % blocks.columns == 0 and k % blocks.inner == 0
    rows, columns = descriptors(x, w, blocks)
    options, registers = launch(blocks)
    _specialised_linear[(multiprocessors(x.device),)](
        rows,
        columns,
        b,
        out,
        None if first else order,
        table,
        weights,
        None if home is None else home.reach,
        triton.cdiv(len(x), blocks.rows) if table is None else table.shape[1],
        held,
        len(x),
        0 if home is None else home.room,
        N=n,
        K=k,
        FIRST=first,
        WEIGHTED=weights is not None,
        ACTIVATION=act,
        COLUMNS=blocks.columns,
        INNER=blocks.inner,
        STAGES=blocks.stages,
        OUT=layout(blocks.rows, blocks.columns, blocks.warps),
        TEAM_REGISTERS=registers,
        **options,
    )


def launch(blocks: Blocks) -> tuple[dict[str, int], int]:
    """Options of the compiler, and the registers of a thread that multiplies.

    All threads start with the same number of registers. The loader gives most of its own to the teams. Four warps at a
    time change their number, so the loader counts as four.
    """
    multiplying = TEAMS.value * blocks.warps
    warps = multiplying + 4
    each = ALL_REGISTERS // (32 * warps) // 8 * 8
    registers = (each * warps - LOADER_REGISTERS.value * 4) // multiplying // 8 * 8
    return {"num_warps": blocks.warps, "maxnreg": each}, registers


def descriptors(x: Tensor, w: Tensor, blocks: Blocks) -> tuple[TensorDescriptor, TensorDescriptor]:
    """What the copy engine has to know of the rows and of the weights.

    A thread holds two neighbouring columns of each eight columns of a product, and could only store four bytes at a time.
    So the copy engine brings the columns of each 32 in another order: column 8 j + 2 q + e comes to place 8 q + 2 j + e.
    Then a thread holds eight neighbouring columns, which are 16 bytes.
    """
    k = w.shape[2]
    rows, columns = block_layouts(blocks, gl.float16 if x.dtype == torch.float16 else gl.bfloat16)
    return (
        TensorDescriptor(x, list(x.shape), [k, 1], [64, blocks.inner], rows),
        TensorDescriptor(
            w,
            [w.shape[0] * w.shape[1] // 32, 4, 4, 2, k],
            [32 * k, 2 * k, 8 * k, k, 1],
            [blocks.columns // 32, 4, 4, 2, blocks.inner],
            columns,
        ),
    )


def block_layouts(blocks: Blocks, kind: gl.dtype) -> tuple[gl.NVMMASharedLayout, gl.NVMMASharedLayout]:
    """How a block of rows and a block of weights lie in shared memory, as ``wgmma`` reads them."""
    rows = gl.NVMMASharedLayout.get_default_for([64, blocks.inner], kind)
    return rows, gl.NVMMASharedLayout(rows.swizzle_byte_width, rows.element_bitwidth, rank=5)


@functools.lru_cache
def layout(rows: int, columns: int, warps: int) -> gl.DistributedLinearLayout:
    """Which numbers of a tile a thread holds, after the columns have their names back: each base doubles a row or a column."""
    registers = [[0, 1], [0, 2], [0, 4], [8, 0]]
    registers += [[0, 2**bit] for bit in range(5, columns.bit_length() - 1)]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    high = [[2**bit, 0] for bit in range(4, rows.bit_length() - 1)]
    by_warp = warps.bit_length() - 1
    return gl.DistributedLinearLayout(registers + high[by_warp:], lanes, high[:by_warp], [], [rows, columns])


# ---------------------------------------------------------------------------------------------------------- the kernel
# rows: descriptor of [P, K]. columns: descriptor of the weights [E, N, K], with their columns in the order of ``descriptors``.
# b: [E, N]. out: [P, N] in the order of ``order`` if FIRST, else [N K, N] by choice.
# order: [P], or None if FIRST. table: [3, T], each tile's expert, first index into ``order``, and end; or None.
# reach: [W] if results go to the memory of several ranks (peers.py), else None. weights: None, or [N K], or with ``reach`` [P].
# tiles: T. experts: E. made: P. room: numbers of choices that a rank has, with ``reach``.
# N: columns of the output. K: terms of the sum. OUT: the layout of a tile.
# TEAM_REGISTERS: of a thread that multiplies.


@gluon.jit(do_not_specialize=["tiles", "experts", "made", "room"])
def _specialised_linear(
    rows,
    columns,
    b,
    out,
    order,
    table,
    weights,
    reach,
    tiles,
    experts,
    made,
    room,
    N: gl.constexpr,
    K: gl.constexpr,
    FIRST: gl.constexpr,
    WEIGHTED: gl.constexpr,
    ACTIVATION: gl.constexpr,
    COLUMNS: gl.constexpr,
    INNER: gl.constexpr,
    STAGES: gl.constexpr,
    OUT: gl.constexpr,
    TEAM_REGISTERS: gl.constexpr,
):
    ROWS: gl.constexpr = OUT.shape[0]
    x_ring = gl.allocate_shared_memory(rows.dtype, [STAGES, ROWS, INNER], rows.layout)
    w_ring = gl.allocate_shared_memory(columns.dtype, [STAGES, COLUMNS // 32, 4, 4, 2, INNER], columns.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [TEAMS, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=ROWS // 64)
        mbarrier.init(empty.index(stage), count=1)
    for team in gl.static_range(TEAMS):
        mbarrier.init(turn.index(team), count=1)
    ring = x_ring, w_ring, full, empty
    plan = table, tiles, experts, made
    to = b, out, order, weights, reach, room
    gl.warp_specialize(
        [
            (_multiply, (0, plan, ring, turn, to, N, K, FIRST, WEIGHTED, ACTIVATION, OUT)),
            (_multiply, (1, plan, ring, turn, to, N, K, FIRST, WEIGHTED, ACTIVATION, OUT)),
            (_load, (plan, ring, rows, columns, N, K)),
        ],
        [gl.num_warps(), 1],
        [TEAM_REGISTERS, LOADER_REGISTERS],
    )


@gluon.jit
def _tile(work, plan, ACROSS: gl.constexpr, ROWS: gl.constexpr):
    """Expert, first place and end of a tile; an expert that is none after the last tile."""
    table, tiles, experts, made = plan
    there = work < tiles * ACROSS
    if table is None:
        expert = gl.where(there, 0, experts)
        first = work // ACROSS * ROWS
        end = gl.minimum(first + ROWS, made)
    else:
        at = table + work // ACROSS
        expert = gl.load(at, mask=there, other=experts)
        first = gl.load(at + tiles, mask=there, other=0)
        end = gl.load(at + 2 * tiles, mask=there, other=0)
    return expert, first, end


@gluon.jit
def _load(plan, ring, rows, columns, N: gl.constexpr, K: gl.constexpr):
    x_ring, w_ring, full, empty = ring
    STAGES: gl.constexpr = x_ring.shape[0]
    ROWS: gl.constexpr = x_ring.shape[1]
    INNER: gl.constexpr = x_ring.shape[2]
    COLUMNS: gl.constexpr = 32 * w_ring.shape[1]
    ACROSS: gl.constexpr = N // COLUMNS
    block = 0
    work = gl.program_id(0)
    expert, first, end = _tile(work, plan, ACROSS, ROWS)
    while expert < plan[2]:
        column = expert * N + work % ACROSS * COLUMNS
        for k in range(0, K, INNER):
            stage = block % STAGES
            mbarrier.wait(empty.index(stage), block // STAGES & 1 ^ 1)
            arrived = full.index(stage)
            mbarrier.expect(arrived, (COLUMNS + 64) * INNER * 2)
            tma.async_copy_global_to_shared(columns, [column // 32, 0, 0, 0, k], arrived, w_ring.index(stage))
            tma.async_copy_global_to_shared(rows, [first, k], arrived, x_ring.index(stage).slice(0, 64))
            for part in gl.static_range(64, ROWS, 64):
                # Rows after the end of the tile are not loaded.
                there = first + part < end
                mbarrier.expect(arrived, 64 * INNER * 2, pred=there)
                mbarrier.arrive(arrived, pred=first + part >= end)
                tma.async_copy_global_to_shared(
                    rows, [first + part, k], arrived, x_ring.index(stage).slice(part, 64), pred=there
                )
            block += 1
        work += gl.num_programs(0)
        expert, first, end = _tile(work, plan, ACROSS, ROWS)


@gluon.jit
def _multiply(
    team: gl.constexpr,
    plan,
    ring,
    turn,
    to,
    N: gl.constexpr,
    K: gl.constexpr,
    FIRST: gl.constexpr,
    WEIGHTED: gl.constexpr,
    ACTIVATION: gl.constexpr,
    OUT: gl.constexpr,
):
    x_ring, w_ring, full, empty = ring
    b, out, order, weights, reach, room = to
    STAGES: gl.constexpr = x_ring.shape[0]
    INNER: gl.constexpr = x_ring.shape[2]
    ROWS: gl.constexpr = OUT.shape[0]
    COLUMNS: gl.constexpr = OUT.shape[1]
    ACROSS: gl.constexpr = N // COLUMNS
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, COLUMNS, 16])
    # Every second tile of this program is this team's, and the blocks of the others are the other team's.
    block = team * (K // INNER)
    turns = 0
    work = gl.program_id(0) + team * gl.num_programs(0)
    expert, first, end = _tile(work, plan, ACROSS, ROWS)
    while expert < plan[2]:
        # What comes from memory is under way while the team multiplies: the end of this tile, and the next one's place.
        row = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
        column = work % ACROSS * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, OUT))
        live = row < end
        bias = gl.load(b + expert * N + column)
        target = row.to(gl.int64) * N
        if not FIRST:
            choice = gl.load(order + row, mask=live, other=0)
            target = choice.to(gl.int64) * N
            if reach is not None:
                # Written so, the compiler knows that eight numbers may be stored at a time.
                far = gl.load(reach + choice // room, mask=live, other=0) // 16 * 8
                target = far + (choice % room).to(gl.int64) * N
        if WEIGHTED:
            weight = gl.load(weights + (choice if reach is None else row), mask=live, other=0.0)
        work += TEAMS * gl.num_programs(0)
        expert, first, end = _tile(work, plan, ACROSS, ROWS)

        sums = gl.zeros((ROWS, COLUMNS), gl.float32, SUMS)
        mbarrier.wait(turn.index(team), turns & 1 ^ (1 - team))
        for k in range(0, K, INNER):
            stage = block % STAGES
            mbarrier.wait(full.index(stage), block // STAGES & 1)
            w = w_ring.index(stage).reshape((COLUMNS, INNER)).permute((1, 0))
            sums = warpgroup_mma(x_ring.index(stage), w, sums, is_async=True)
            # The product before this one is done, and its block may be filled again.
            sums = warpgroup_mma_wait(1, deps=(sums,))
            mbarrier.arrive(empty.index((block + STAGES - 1) % STAGES), pred=k > 0)
            block += 1
        mbarrier.arrive(turn.index(1 - team))
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(empty.index((block + STAGES - 1) % STAGES))
        block += K // INNER
        turns += 1

        # The columns get their names back, which moves nothing.
        total = sums.reshape((ROWS, COLUMNS // 32, 4, 4, 2)).permute((0, 1, 3, 2, 4)).reshape((ROWS, COLUMNS))
        total = gl.convert_layout(total, OUT, assert_trivial=True)
        total = activate(total + bias.to(gl.float32)[None, :], ACTIVATION, False)
        if WEIGHTED:
            total *= weight.to(gl.float32)[:, None]
        gl.store(out + target[:, None] + column[None, :], total.to(out.dtype.element_ty), mask=live[:, None])
    if not FIRST and reach is None:
        # The tiles of choices of no expert come last, and their results are zero.
        while first < end:
            row = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
            column = work % ACROSS * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, OUT))
            target = gl.load(order + row, mask=row < end, other=0)
            nothing = gl.zeros((ROWS, COLUMNS), out.dtype.element_ty, OUT)
            gl.store(out + target[:, None] * N + column[None, :], nothing, mask=(row < end)[:, None])
            work += TEAMS * gl.num_programs(0)
            expert, first, end = _tile(work, plan, ACROSS, ROWS)
