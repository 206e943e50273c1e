"""Log-probabilities of targets from features, for many rows on Hopper: no logit comes to memory.

A program has 128 rows and a segment of the dictionary. Its loader lets the copy engine fill a ring of blocks, as in
specialised.py. Two teams have 64 rows each and 256 types at a time; they round the logits to the model's dtype, as if they
were stored, and keep a greatest one and a sum of exponentials for each row. A second kernel combines the segments.

Shape letters: N rows, D features, V dictionary, S segments.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
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

from moekit.nn.kernels.gpu import is_hopper, multiprocessors
from moekit.nn.parts import part

# Rows of a team, types at a time, terms at a time, and blocks under way.
ROWS, TYPES, INNER, STAGES = (gl.constexpr(number) for number in (64, 256, 64, 4))
TEAMS = gl.constexpr(2)
# The registers that a thread begins with, that one of a team has, and that one of the loader has.
REGISTERS, TEAM_REGISTERS, LOADER_REGISTERS = 168, gl.constexpr(240), gl.constexpr(24)
LOG2E = gl.constexpr(math.log2(math.e))
# The fewest rows for which this is measured to be faster.
LEAST = 2048
# The most segments, of which the second kernel has all at once.
SEGMENTS = 32


def fits(features: Tensor, weight: Tensor) -> bool:
    """Whether the kernels take ``features`` [N, D] and ``weight`` [V, D] here, which is where they are measured to be faster."""
    halves = features.dtype in (torch.float16, torch.bfloat16) and weight.dtype == features.dtype
    rows, dims = features.shape
    return halves and rows >= LEAST and dims % INNER.value == 0 and is_hopper(features.device)


def target_log_probs(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """[N, D] features, [V, D] weights and [N] int64 targets -> [N] float32 natural log-probabilities; for inference."""
    features, weight = features.contiguous(), weight.contiguous()
    (rows, dims), vocab = features.shape, len(weight)
    programs = multiprocessors(features.device)
    row_blocks, blocks = triton.cdiv(rows, TEAMS.value * ROWS.value), triton.cdiv(vocab, TYPES.value)
    each = segment(row_blocks, blocks, programs)
    segments = triton.cdiv(blocks, each)
    parts = torch.empty(2, segments, rows, dtype=torch.float32, device=features.device)
    kind = gl.float16 if features.dtype == torch.float16 else gl.bfloat16
    with part("output"):
        _output[(programs,)](
            TensorDescriptor(features, [rows, dims], [dims, 1], [ROWS.value, INNER.value], layout(kind)),
            TensorDescriptor(weight, [vocab, dims], [dims, 1], [TYPES.value // 2, INNER.value], layout(kind)),
            parts,
            rows,
            row_blocks,
            segments,
            each,
            V=vocab,
            D=dims,
            num_warps=4,
            maxnreg=REGISTERS,
        )
    found = torch.empty(rows, dtype=torch.float32, device=features.device)
    _combined[(triton.cdiv(rows, 8),)](
        features,
        weight,
        targets.contiguous(),
        parts,
        found,
        rows,
        segments,
        D=dims,
        ROWS=8,
        BLOCK=triton.next_power_of_2(dims),
        SEGMENTS=SEGMENTS,
    )
    return found


def layout(kind: gl.dtype) -> gl.NVMMASharedLayout:
    """How a block lies in shared memory, as ``wgmma`` reads it."""
    return gl.NVMMASharedLayout.get_default_for([ROWS.value, INNER.value], kind)


def segment(row_blocks: int, blocks: int, programs: int) -> int:
    """The blocks of types of a segment: so that the program with the most work has the least, in segments as long as possible."""
    lengths = (triton.cdiv(blocks, segments) for segments in range(1, SEGMENTS + 1))
    return min(lengths, key=lambda each: triton.cdiv(row_blocks * triton.cdiv(blocks, each), programs) * each)


# --------------------------------------------------------------------------------------------------------- the kernels
# features: descriptor of [N, D]. weight: descriptor of [V, D]. parts: [2, S, N], greatest logit, and sum relative to it.
# rows: N. row_blocks: of 128 rows. each: blocks of types of a segment.


@gluon.jit(do_not_specialize=["rows", "row_blocks", "segments", "each"])
def _output(features, weight, parts, rows, row_blocks, segments, each, V: gl.constexpr, D: gl.constexpr):
    kind: gl.constexpr = features.dtype
    x_ring = gl.allocate_shared_memory(kind, [STAGES, TEAMS * ROWS, INNER], features.layout)
    w_ring = gl.allocate_shared_memory(kind, [STAGES, TYPES, INNER], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=TEAMS)
    ring = x_ring, w_ring, full, empty
    plan = rows, row_blocks, segments, each
    gl.warp_specialize(
        [
            (_team, (0, plan, ring, parts, V, D)),
            (_team, (1, plan, ring, parts, V, D)),
            (_load, (plan, ring, features, weight, V, D)),
        ],
        [4, 1],
        [TEAM_REGISTERS, LOADER_REGISTERS],
    )


@gluon.jit
def _work(work, plan, V: gl.constexpr):
    """The first row of a program's work, the segment, and its first and last block. Neighbours share a segment."""
    _, row_blocks, _, each = plan
    segment = work // row_blocks
    begin = segment * each
    return (
        work % row_blocks * (TEAMS * ROWS),
        segment,
        begin,
        gl.minimum(begin + each, (V + TYPES - 1) // TYPES),
    )


@gluon.jit
def _load(plan, ring, features, weight, V: gl.constexpr, D: gl.constexpr):
    x_ring, w_ring, full, empty = ring
    count = 0
    for work in range(gl.program_id(0), plan[1] * plan[2], gl.num_programs(0)):
        row, _, begin, end = _work(work, plan, V)
        for block in range(begin, end):
            for k in range(0, D, INNER):
                stage = count % STAGES
                mbarrier.wait(empty.index(stage), count // STAGES & 1 ^ 1)
                arrived = full.index(stage)
                # What is beyond the last row or type comes as zeros.
                mbarrier.expect(arrived, (TEAMS * ROWS + TYPES) * INNER * 2)
                for team in gl.static_range(TEAMS):
                    x = x_ring.index(stage).slice(team * ROWS, ROWS)
                    tma.async_copy_global_to_shared(features, [row + team * ROWS, k], arrived, x)
                for half in gl.static_range(0, TYPES, TYPES // 2):
                    w = w_ring.index(stage).slice(half, TYPES // 2)
                    tma.async_copy_global_to_shared(weight, [block * TYPES + half, k], arrived, w)
                count += 1


@gluon.jit
def _team(team: gl.constexpr, plan, ring, parts, V: gl.constexpr, D: gl.constexpr):
    x_ring, w_ring, full, empty = ring
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TYPES, 16])
    count = 0
    for work in range(gl.program_id(0), plan[1] * plan[2], gl.num_programs(0)):
        row, segment, begin, end = _work(work, plan, V)
        greatest = gl.full((ROWS,), float("-inf"), gl.float32, gl.SliceLayout(1, SUMS))
        total = gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, SUMS))
        for block in range(begin, end):
            sums = gl.zeros((ROWS, TYPES), gl.float32, SUMS)
            for k in range(0, D, INNER):
                stage = count % STAGES
                mbarrier.wait(full.index(stage), count // STAGES & 1)
                x = x_ring.index(stage).slice(team * ROWS, ROWS)
                sums = warpgroup_mma(x, w_ring.index(stage).permute((1, 0)), sums, is_async=True)
                # The product before this one is done, and its block may be filled again.
                sums = warpgroup_mma_wait(1, deps=(sums,))
                mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), pred=k > 0)
                count += 1
            sums = warpgroup_mma_wait(0, deps=(sums,))
            mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES))

            logit = _rounded(sums, w_ring.dtype == gl.float16)
            if (block + 1) * TYPES > V:
                type = block * TYPES + gl.arange(0, TYPES, layout=gl.SliceLayout(0, SUMS))
                logit = gl.where((type < V)[None, :], logit, float("-inf"))
            new = gl.maximum(greatest, gl.max(logit, 1))
            shift = gl.where(new == float("-inf"), 0.0, new) * LOG2E
            fade = gl.exp2(greatest * LOG2E - shift)
            total = total * fade + gl.sum(gl.exp2(logit * LOG2E - shift[:, None]), 1)
            greatest = new
        row += team * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
        at = parts + segment.to(gl.int64) * plan[0] + row
        gl.store(at, greatest, mask=row < plan[0])
        gl.store(at + plan[2].to(gl.int64) * plan[0], total, mask=row < plan[0])


@gluon.jit
def _rounded(x, HALF: gl.constexpr):
    """``x`` as float16 or bfloat16, and back. In these words the compiler takes two numbers an instruction."""
    if HALF:
        back: gl.constexpr = "mov.b32 {low, high}, two; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }"
        words: gl.constexpr = "{ .reg .b32 two; .reg .b16 low, high; cvt.rn.f16x2.f32 two, $3, $2; " + back
    else:
        back: gl.constexpr = "shl.b32 $0, two, 16; and.b32 $1, two, 0xffff0000; }"
        words: gl.constexpr = "{ .reg .b32 two; cvt.rn.bf16x2.f32 two, $3, $2; " + back
    return gl.inline_asm_elementwise(words, "=f,=f,f,f", [x], dtype=gl.float32, is_pure=True, pack=2)


# found: [N].
@triton.jit(do_not_specialize=["rows", "segments"])
def _combined(
    features,
    weight,
    targets,
    parts,
    found,
    rows,
    segments,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    one = tl.arange(0, SEGMENTS)
    at = parts + one[:, None].to(tl.int64) * rows + row[None, :]
    there = (one < segments)[:, None] & live[None, :]
    top = tl.load(at, mask=there, other=float("-inf"))
    total = tl.load(at + segments.to(tl.int64) * rows, mask=there, other=0.0)
    greatest = tl.max(top, axis=0)
    total = tl.sum(total * tl.exp(top - greatest[None, :]), axis=0)
    # The target's logit once more, rounded in the same way.
    column = tl.arange(0, BLOCK)
    fits = live[:, None] & (column < D)[None, :]
    x = tl.load(features + row[:, None] * D + column[None, :], mask=fits, other=0.0).to(tl.float32)
    target = tl.load(targets + row, mask=live, other=0)
    w = tl.load(weight + target[:, None] * D + column[None, :], mask=fits, other=0.0).to(tl.float32)
    logit = tl.sum(x * w, axis=1).to(features.dtype.element_ty).to(tl.float32)
    tl.store(found + row, logit - greatest - tl.log(total), mask=live)
