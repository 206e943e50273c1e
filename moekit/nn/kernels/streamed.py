"""The experts of a few sequences: the gate's choice and both products in one kernel that reads the weights as one stream, for Hopper.

Reading the weights takes the time, and here it hardly ever stops. There is a tile for each chosen expert, or each ROWS choices of it, and
block of columns. A program stays, and takes many of them. First each program makes the gate's choice of all rows and sorts it for itself, which
takes less time than two more kernels. Then its warps have four kinds of work:

    weights    one warp lets the copy engine fill a ring of blocks in shared memory, ahead of the products, across tiles, and on
               into the second product while other programs still compute the first one
    rows       one warp copies the rows of the tiles beside the weights; before the second product it waits until the hidden
               rows of all programs are stored (grid_barrier.py)
    products   four warps multiply, with the weights as the left operand
    results    one warp stores what they have found

Products and sums are those of grouped.py, to the last bit. The gate's sum of exponentials has another order than in gate.py, so the last
bits of weights may differ, and among experts whose probabilities round alike the choice.

Shape letters: N rows, P = 2 N choices, E experts. D model dim, F expert width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moekit.nn.gate import Gate
from moekit.nn.kernels import gate, grid_barrier, overlap
from moekit.nn.kernels.activations import ACTIVATIONS
from moekit.nn.kernels.activations import activate as _activate
from moekit.nn.kernels.gpu import is_hopper, multiprocessors
from moekit.nn.kernels.grid_barrier import ARRIVE_OF_A_WARP, LOOKS, WAIT_OF_A_WARP
from moekit.nn.kernels.overlap import overlapped

if TYPE_CHECKING:
    from moekit.nn.experts import Experts

activate, _rounded = gluon.jit(_activate.fn), gluon.jit(gate._rounded.fn)
start, wait = gluon.jit(overlap.start.fn), gluon.jit(overlap.wait.fn)
begun = gluon.jit(grid_barrier.begun.fn)
# Triton 3.6 has it by another name.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
# The most rows, and the most experts: each program has the logits of all.
MOST, EXPERTS = 16, 1024
# A tile has up to ROWS rows of one expert and COLUMNS columns, INNER terms at a time. WARPS multiply; STAGES blocks are under way, and SLOTS
# tiles wait to be stored.
ROWS, COLUMNS, INNER = gl.constexpr(16), gl.constexpr(64), gl.constexpr(128)
WARPS, STAGES, SLOTS = 4, gl.constexpr(10), gl.constexpr(2)


def fits(rule: Gate, experts: Experts, x: Tensor) -> bool:
    """Whether :func:`chosen_ffn` supports this gate and these experts, and ``x`` [N, D]."""
    whole = not any(dim % COLUMNS.value or dim % INNER.value for dim in (x.shape[1], experts.width))
    return (
        is_hopper(x.device)
        and x.dtype == experts.w1.dtype in (torch.float16, torch.bfloat16)
        and 0 < len(x) <= MOST
        and experts.held <= EXPERTS
        and gate.chooses(rule)
        and rule.top_k == 2
        and whole
    )


def chosen_ffn(rule: Gate, experts: Experts, logits: Tensor, x: Tensor, count: Tensor) -> Tensor:
    """The weighted outputs of both experts that the gate chooses, [N, 2, D]; for inference.

    Args:
        logits: [N, E].
        x: [N, D], for which :func:`fits` says yes.
        count: the model's :func:`moekit.nn.kernels.grid_barrier.counter`.
    """
    (rows, dim), device = x.shape, x.device
    choices, programs = 2 * rows, multiprocessors(device)
    # Each program plans in memory of its own.
    order = torch.empty(programs, choices, dtype=torch.long, device=device)
    table = torch.empty(programs, 3, choices, dtype=torch.int32, device=device)
    weights = torch.empty(programs, choices, dtype=x.dtype, device=device)
    hidden, out = x.new_empty(choices, experts.width), x.new_empty(rows, 2, dim)
    kind = torch.float32 if rule.config.gate_fp32 else logits.dtype
    assert all(tensor.is_contiguous() for tensor in (logits, x, *experts.tensors.values()))
    assert logits.shape == (rows, experts.held)
    _streamed_ffn[(programs,)](
        descriptor(experts.w1),
        descriptor(experts.w2),
        x,
        hidden,
        experts.b1,
        experts.b2,
        out,
        logits,
        order,
        table,
        weights,
        count,
        rows,
        torch.finfo(kind).eps,
        # Half of the work for up to eight rows.
        MOST=8 if rows <= 8 else MOST,
        E=logits.shape[1],
        D=dim,
        F=experts.width,
        ACTIVATION=ACTIVATIONS[experts.activation],
        HALF=kind == torch.float16,
        BRAIN=kind == torch.bfloat16,
        PROGRAMS=programs,
        num_warps=WARPS,
        launch_cooperative_grid=True,
        **overlapped(device),
    )
    return out


def descriptor(w: Tensor) -> TensorDescriptor:
    """What the copy engine has to know of the weights [E, N, K]."""
    held, n, k = w.shape
    layout = block_layout(gl.float16 if w.dtype == torch.float16 else gl.bfloat16)
    return TensorDescriptor(w, [held * n, k], [k, 1], [COLUMNS.value, INNER.value], layout)


def block_layout(kind: gl.dtype) -> gl.NVMMASharedLayout:
    """How a block of weights lies in shared memory, as ``wgmma`` reads it; a block of rows lies in the same way."""
    return gl.NVMMASharedLayout.get_default_for([COLUMNS.value, INNER.value], kind)


# ---------------------------------------------------------------------------------------------------------- the kernel
# up, down: descriptors of the weights [E, F, D] and [E, D, F]. x: [N, D]. hidden: [P, F], sorted by expert. up_b: [E, F]; down_b: [E, D].
# out: [P, D] by choice. logits: [N, E]. count: [1], the counter of the barrier. rows: N. eps: of the gate's dtype.
# Of each program: order [P], the choices sorted by expert; table [3, P], the expert of a tile, its first index into ``order``, and its
# end; weights [P] by choice.
#
# Programs take turns at all tiles: first those of the first product, then those of the second one.


@gluon.jit(do_not_specialize=["rows"])
def _streamed_ffn(
    up,
    down,
    x,
    hidden,
    up_b,
    down_b,
    out,
    logits,
    order,
    table,
    weights,
    count,
    rows,
    eps,
    MOST: gl.constexpr,
    E: gl.constexpr,
    D: gl.constexpr,
    F: gl.constexpr,
    ACTIVATION: gl.constexpr,
    HALF: gl.constexpr,
    BRAIN: gl.constexpr,
    PROGRAMS: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    RESULTS: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    w_ring = gl.allocate_shared_memory(up.dtype, [STAGES, COLUMNS, INNER], up.layout)
    x_ring = gl.allocate_shared_memory(up.dtype, [STAGES, ROWS, INNER], up.layout)
    results = gl.allocate_shared_memory(up.dtype, [SLOTS, ROWS, COLUMNS], RESULTS)
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(free.index(slot), count=1)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        # The loader of weights, and the 32 threads of the loader of rows.
        mbarrier.init(full.index(stage), count=33)
        mbarrier.init(empty.index(stage), count=1)
    wait(OVERLAP)
    # What the counter is when all programs have arrived.
    target = begun(count, PROGRAMS) + PROGRAMS
    choices = 2 * rows
    order += gl.program_id(0) * choices
    weights += gl.program_id(0) * choices
    table += gl.program_id(0) * 3 * choices
    chosen = _chosen(logits, weights, rows, eps, MOST, E, HALF, BRAIN)
    used = _planned(chosen, order, table, choices)
    barrier()
    ring = w_ring, x_ring, full, empty
    slots = results, ready, free
    plan = table, choices, used
    gl.warp_specialize(
        [
            (_multiply, (plan, ring, slots, up_b, down_b, order, weights, D, F, ACTIVATION)),
            (_load_weights, (plan, ring, up, down, D, F, OVERLAP)),
            (_load_rows, (plan, ring, x, hidden, order, count, target, D, F)),
            (_store, (plan, slots, hidden, out, order, count, D, F)),
        ],
        [1, 1, 1],
        # Four warps at a time change their number of registers.
        [120, 120, 120],
    )


@gluon.jit
def _chosen(
    logits, weights, rows, eps, MOST: gl.constexpr, E: gl.constexpr, HALF: gl.constexpr, BRAIN: gl.constexpr
):
    """The experts that the gate chooses, [2 MOST], and E where there is no row; the formulas are those of ``top`` in gate.py."""
    kind: gl.constexpr = weights.dtype.element_ty
    # A warp has all of its rows at once, so their reductions take as long as those of one.
    TOGETHER: gl.constexpr = MOST // gl.num_warps()
    LOGITS: gl.constexpr = gl.BlockedLayout([1, 8], [TOGETHER, 32 // TOGETHER], [gl.num_warps(), 1], [1, 0])
    expert = gl.arange(0, triton.next_power_of_2(E), layout=gl.SliceLayout(0, LOGITS))[None, :]
    row = gl.arange(0, MOST, layout=gl.SliceLayout(1, LOGITS))
    here = row < rows
    real = here[:, None] & (expert < E)
    x = gl.load(logits + row[:, None] * E + expert, mask=real, other=float("-inf")).to(gl.float32)
    most = gl.max(x, axis=1)
    whole = gl.sum(gl.exp(x - most[:, None]), axis=1)
    p = gl.where(real, _rounded(gl.exp(x - most[:, None]) / whole[:, None], HALF, BRAIN), -1.0)
    # Gluon has no argmax.
    first = gl.min(gl.where(p == gl.max(p, axis=1)[:, None], expert, E - 1), axis=1)
    # exp(most - most) is 1, and NaN where the greatest logit is not finite.
    greatest = _rounded(gl.exp(most - most) / whole, HALF, BRAIN)
    rest = gl.where(expert == first[:, None], float("-inf"), x)
    best = gl.max(rest, axis=1)
    second = gl.min(gl.where(rest == best[:, None], expert, E - 1), axis=1)
    other = _rounded(gl.exp(best - most) / whole, HALF, BRAIN)
    total = gl.maximum(_rounded(greatest + other, HALF, BRAIN), eps)
    gl.store(weights + row * 2, (greatest / total).to(kind), mask=here)
    gl.store(weights + row * 2 + 1, (other / total).to(kind), mask=here)
    return gl.join(gl.where(here, first, E), gl.where(here, second, E)).reshape([2 * MOST])


@gluon.jit
def _planned(chosen, order, table, choices):
    """Sort the choices by expert, and make a tile for each expert, or for each ROWS choices of it; the number of tiles."""
    CHOICES: gl.constexpr = chosen.shape[0]
    PAIRS: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [gl.num_warps(), 1], [1, 0])
    me = gl.arange(0, CHOICES, layout=gl.SliceLayout(1, PAIRS))
    before = gl.arange(0, CHOICES, layout=gl.SliceLayout(0, PAIRS))[None, :] < me[:, None]
    mine = gl.convert_layout(chosen, gl.SliceLayout(1, PAIRS))
    theirs = gl.convert_layout(chosen, gl.SliceLayout(0, PAIRS))[None, :]
    same, less = theirs == mine[:, None], theirs < mine[:, None]
    # The place of a choice among those of its expert, their number, and the place of the first of them among all.
    place = gl.sum((same & before).to(gl.int32), axis=1)
    number = gl.sum(same.to(gl.int32), axis=1)
    begin = gl.sum(less.to(gl.int32), axis=1)
    here = me < choices
    # An expert has more than ROWS choices where both choices of a row are one expert, as there is no other, or logits are NaN.
    first = here & (place % ROWS == 0)
    of_others = gl.convert_layout(first.to(gl.int32), gl.SliceLayout(0, PAIRS))[None, :]
    tile = gl.sum(gl.where(less | (same & before), of_others, 0), axis=1)
    gl.store(order + begin + place, me.to(gl.int64), mask=here)
    gl.store(table + tile, mine, mask=first)
    gl.store(table + choices + tile, begin + place, mask=first)
    gl.store(table + 2 * choices + tile, begin + gl.minimum(place + ROWS, number), mask=first)
    return gl.sum(first.to(gl.int32), axis=0)


@gluon.jit
def _expert(work, plan, ACROSS: gl.constexpr):
    """The expert of a block of columns; 0 behind the last one."""
    table, _, used = plan
    return gl.load(table + work // ACROSS, mask=work < used * ACROSS, other=0)


@gluon.jit
def _places(work, plan, ACROSS: gl.constexpr):
    """The first place and the end of the tile of a block of columns; none behind the last one."""
    table, choices, used = plan
    at = table + choices + work // ACROSS
    there = work < used * ACROSS
    return gl.load(at, mask=there, other=0), gl.load(at + choices, mask=there, other=0)


@gluon.jit
def _rows(first, end, order, LAYOUT: gl.constexpr):
    """The choices of a tile, or without an ``order`` their places, and which of the tile's rows there are."""
    row = first + gl.arange(0, ROWS, layout=LAYOUT)
    live = row < end
    if order is not None:
        row = gl.load(order + row, mask=live, other=0)
    return row, live


@gluon.jit
def _load_weights(plan, ring, up, down, D: gl.constexpr, F: gl.constexpr, OVERLAP: gl.constexpr):
    work, block = _load_weights_of(gl.program_id(0), gl.to_tensor(0), plan, ring, up, F, D)
    _load_weights_of(work, block, plan, ring, down, D, F)
    # Earlier, what other kernels fetch ahead would come between.
    start(OVERLAP)


@gluon.jit
def _load_weights_of(work, block, plan, ring, w, N: gl.constexpr, K: gl.constexpr):
    """Read the weights of the blocks of columns of this program; the first one of the next product, and the place in the ring."""
    w_ring, _, full, empty = ring
    ACROSS: gl.constexpr = N // COLUMNS
    most = plan[2] * ACROSS
    expert = _expert(work, plan, ACROSS)
    while work < most:
        column = expert * N + work % ACROSS * COLUMNS
        work += gl.num_programs(0)
        expert = _expert(work, plan, ACROSS)
        for k in range(0, K, INNER):
            stage = block % STAGES
            mbarrier.wait(empty.index(stage), block // STAGES & 1 ^ 1)
            arrived = full.index(stage)
            mbarrier.expect(arrived, COLUMNS * INNER * 2)
            tma.async_copy_global_to_shared(w, [column, k], arrived, w_ring.index(stage))
            block += 1
    return work - most, block


@gluon.jit
def _load_rows(plan, ring, x, hidden, order, count, target, D: gl.constexpr, F: gl.constexpr):
    work, block = _load_rows_of(gl.program_id(0), gl.to_tensor(0), plan, ring, x, order, F, D)
    gl.inline_asm_elementwise(
        WAIT_OF_A_WARP, "=r,l,l,r", [count.to(gl.int64), target, LOOKS], dtype=gl.int32, is_pure=False, pack=1
    )
    _load_rows_of(work, block, plan, ring, hidden, None, D, F)


@gluon.jit
def _load_rows_of(work, block, plan, ring, x, order, N: gl.constexpr, K: gl.constexpr):
    """Copy the rows of this program's tiles, of the choices in ``order``; without it, rows are sorted by expert."""
    _, x_ring, full, empty = ring
    ACROSS: gl.constexpr = N // COLUMNS
    # 16 bytes of a thread at a time.
    BY_THREAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // INNER, INNER // 8], [1, 1], [1, 0])
    inner = gl.arange(0, INNER, layout=gl.SliceLayout(0, BY_THREAD))
    most = plan[2] * ACROSS
    first, end = _places(work, plan, ACROSS)
    while work < most:
        row, live = _rows(first, end, order, gl.SliceLayout(1, BY_THREAD))
        if order is not None:
            row = row // 2
        at = x + row.to(gl.int64)[:, None] * K + inner[None, :]
        work += gl.num_programs(0)
        first, end = _places(work, plan, ACROSS)
        for k in range(0, K, INNER):
            stage = block % STAGES
            mbarrier.wait(empty.index(stage), block // STAGES & 1 ^ 1)
            async_copy.async_copy_global_to_shared(x_ring.index(stage), at + k, mask=live[:, None])
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            block += 1
    return work - most, block


@gluon.jit
def _multiply(
    plan,
    ring,
    slots,
    up_b,
    down_b,
    order,
    weights,
    D: gl.constexpr,
    F: gl.constexpr,
    ACTIVATION: gl.constexpr,
):
    begin = gl.program_id(0), gl.to_tensor(0), gl.to_tensor(0)
    work, block, n = _multiply_of(*begin, plan, ring, slots, up_b, None, None, F, D, ACTIVATION)
    _multiply_of(work, block, n, plan, ring, slots, down_b, order, weights, D, F, 0)


@gluon.jit
def _multiply_of(
    work, block, n, plan, ring, slots, b, order, weights, N: gl.constexpr, K: gl.constexpr, ACTIVATION: gl.constexpr
):  # fmt: skip
    """The products of this program's tiles, times the ``weights`` by choice if there are any."""
    w_ring, x_ring, full, empty = ring
    results, ready, free = slots
    ACROSS: gl.constexpr = N // COLUMNS
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, ROWS, 16])
    most = plan[2] * ACROSS
    expert = _expert(work, plan, ACROSS)
    first, end = _places(work, plan, ACROSS)
    while work < most:
        # What the end of the tile needs from memory is under way while the team multiplies.
        column = work % ACROSS * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, SUMS))
        bias = gl.load(b + expert * N + column)
        if weights is not None:
            choice, live = _rows(first, end, order, gl.SliceLayout(0, SUMS))
            weight = gl.load(weights + choice, mask=live, other=0.0)
        work += gl.num_programs(0)
        expert = _expert(work, plan, ACROSS)
        first, end = _places(work, plan, ACROSS)

        sums = gl.zeros((COLUMNS, ROWS), gl.float32, SUMS)
        for k in range(0, K, INNER):
            stage = block % STAGES
            mbarrier.wait(full.index(stage), block // STAGES & 1)
            # The rows came by copies that wgmma does not see without this.
            fence_async_shared()
            sums = warpgroup_mma(
                w_ring.index(stage), x_ring.index(stage).permute((1, 0)), sums, is_async=True
            )
            # The product before this one is done, and its block may be filled again.
            sums = warpgroup_mma_wait(1, deps=(sums,))
            mbarrier.arrive(empty.index((block + STAGES - 1) % STAGES), pred=k > 0)
            block += 1
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(empty.index((block + STAGES - 1) % STAGES))

        total = activate(sums + bias.to(gl.float32)[:, None], ACTIVATION, False)
        if weights is not None:
            total *= weight.to(gl.float32)[None, :]
        slot = n % SLOTS
        mbarrier.wait(free.index(slot), n // SLOTS & 1 ^ 1)
        results.index(slot).permute((1, 0)).store(total.to(results.dtype))
        mbarrier.arrive(ready.index(slot))
        n += 1
    return work - most, block, n


@gluon.jit
def _store(plan, slots, hidden, out, order, count, D: gl.constexpr, F: gl.constexpr):
    work, n = _store_of(gl.program_id(0), gl.to_tensor(0), plan, slots, hidden, None, F)
    # What all threads of the warp have stored comes before the arrival of one.
    barrier()
    gl.inline_asm_elementwise(
        ARRIVE_OF_A_WARP, "=r,l", [count.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1
    )
    _store_of(work, n, plan, slots, out, order, D)


@gluon.jit
def _store_of(work, n, plan, slots, out, order, N: gl.constexpr):
    """Store the results of this program's tiles; by choice with an ``order``, else sorted by expert."""
    results, ready, free = slots
    ACROSS: gl.constexpr = N // COLUMNS
    # 16 bytes of a thread at a time.
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [1, 1], [1, 0])
    own = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, OUT))
    most = plan[2] * ACROSS
    first, end = _places(work, plan, ACROSS)
    while work < most:
        row, live = _rows(first, end, order, gl.SliceLayout(1, OUT))
        at = out + row.to(gl.int64)[:, None] * N + (work % ACROSS * COLUMNS + own)[None, :]
        work += gl.num_programs(0)
        first, end = _places(work, plan, ACROSS)
        slot = n % SLOTS
        mbarrier.wait(ready.index(slot), n // SLOTS & 1)
        gl.store(at, results.index(slot).load(OUT), mask=live[:, None])
        mbarrier.arrive(free.index(slot))
        n += 1
    return work - most, n
