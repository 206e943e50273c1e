"""The kernels of a decode step in one launch (one_launch.py): one for a rank with a sequence, one for a rank without.

Shape letters: D model dim, H heads, C head dim, M slots, E experts, V dictionary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moekit.nn.kernels.grid_barrier import arrive, begun, wait
from moekit.nn.kernels.one_parts import FFN, OUT, PROJECT, addresses
from moekit.nn.kernels.one_peers import (
    addresses_of,
    arrived,
    exchanges,
    feed_choices,
    hand_out,
    hand_out_nothing,
    note,
    send_home,
    settle,
)
from moekit.nn.kernels.one_phases import (
    ask_gate,
    attend,
    attend_weights,
    begin,
    feed,
    feed_experts,
    feed_weights,
    fetch_output,
    finish,
    finish_weights,
    gate_weights,
    normed_row,
    project,
    project_weights,
)

# The values of ONLY: all phases in one launch, or one of them.
ALL, BEGIN, PROJECTION, ATTENTION, GATE, FEED, FINISH, HAND_OUT, CHOICES, HOME = map(
    tl.constexpr, range(-1, 9)
)


# tokens [1]; embed [V or more, D]; positions [M + 2 or more, D] or None; out [V].
# table [layers + 1, COLUMNS]; count [1]; kv [layers, 2, 1, H, M, C]; lengths [1].
# residual [2, D] int64; qkv [3 D]; logits [E]: room for what programs tell each other.
# gain and shift: the last norm's weight and bias, [D] or None; output [V or more, D].
# post: the table of addresses for exchanges, or None; rank, first_expert and held: this rank, its first expert, and their number.
@triton.jit(do_not_specialize=["rank", "first_expert", "held", "slots", "first", "last"])
def step(
    tokens, embed, positions, out, table, count, kv, lengths, residual, qkv, logits, gain, shift, output,
    post, rank, first_expert, held, slots, embed_scale, eps, gate_eps, scale, first, last,
    ONLY: tl.constexpr, DENSE: tl.constexpr, MOE: tl.constexpr, s: tl.constexpr,
):  # fmt: skip
    slots = slots.to(tl.int64)
    kind: tl.constexpr = embed.dtype.element_ty
    # Where each phase is a launch of its own, no program waits for another one, and nothing comes ahead of time.
    apart: tl.constexpr = ONLY != ALL
    meeting: tl.constexpr = 1 if apart else s.programs
    over_ranks: tl.constexpr = post is not None
    target = begun(count, meeting)
    if ONLY == ALL or ONLY == BEGIN:
        begin(tokens, embed, positions, lengths, residual, embed_scale, s)
        arrive(count, meeting)
    # Whether sums of the layer before come home, which belong to the residual stream.
    coming = tl.zeros((), dtype=tl.int32)
    box, stamp = None, coming
    if over_ranks:
        box = addresses_of(post)
        stamp = exchanges(box)
        if apart and MOE:
            before = addresses(table, tl.maximum(first - 1, 0), FFN, 3)
            coming = ((first > 0) & (before[2] != 0)).to(tl.int32)
    at = addresses(table, first, PROJECT, 4)
    length = tl.load(lengths)
    for layer in range(first, last):
        here, there = residual + layer % 2 * s.d, residual + (1 - layer % 2) * s.d
        if ONLY == ALL or ONLY == PROJECTION:
            ready = project_weights(at, kind, s)
            if coming == 0:
                target = wait(count, target, meeting)
        of_out = addresses(table, layer, OUT, 2)
        if ONLY == ALL or ONLY == PROJECTION:
            units = arrived(residual + (layer + coming) % 2 * s.d, box, coming, stamp, s)
            if over_ranks:
                settle(here, units, coming, s)
            project(ready, units, qkv, eps, s)
            arrive(count, meeting)
        if ONLY == ALL or ONLY == ATTENTION:
            seen = attend_weights(tl.program_id(0), length, of_out, kv, slots, layer, s)
            target = wait(count, target, meeting)
        of_ffn = addresses(table, layer, FFN, 9)
        following = addresses(table, layer + 1, PROJECT, 4)
        if ONLY == ALL or ONLY == ATTENTION:
            attend(seen, of_out, here, there, qkv, kv, slots, layer, scale, s)
            arrive(count, meeting)
        if ONLY == ALL:
            if layer + 1 == last:
                fetch_output(output, s)
        moe = MOE
        if MOE and DENSE:
            moe = of_ffn[2] != 0
        coming *= 0
        if moe:
            if ONLY == ALL or ONLY == GATE:
                gate = gate_weights(of_ffn, kind, s)
                target = wait(count, target, meeting)
                row = ask_gate(gate, here, logits, eps, s)
                arrive(count, meeting)
            if apart and (ONLY == FEED or ONLY == HAND_OUT):
                row = normed_row(of_ffn, here, eps, kind, s)
            if not over_ranks:
                if ONLY == ALL or ONLY == FEED:
                    target = wait(count, target, meeting)
                    feed_experts(of_ffn, row, here, there, logits, gate_eps, s)
                    arrive(count, meeting)
            else:
                coming += 1
                stamp += 1
                if ONLY == ALL or ONLY == HAND_OUT:
                    target = wait(count, target, meeting)
                    hand_out(box, row, logits, gate_eps, rank, stamp, s)
                target = _answer(
                    of_ffn, box, first_expert, held, rank, stamp, count, target, meeting, ONLY, kind, False, s
                )
        elif ONLY == ALL or ONLY == FEED:
            fed = feed_weights(of_ffn, kind, s)
            target = wait(count, target, meeting)
            feed(fed, here, there, eps, kind, s)
            arrive(count, meeting)
        at = (following[0], following[1], following[2], following[3])
    if ONLY == ALL or ONLY == FINISH:
        done = finish_weights(gain, shift, output, s)
        if coming == 0:
            target = wait(count, target, meeting)
        units = arrived(residual + (last + coming) % 2 * s.d, box, coming, stamp, s)
        finish(done, units, output, out, eps, ONLY == ALL, s)
        arrive(count, meeting)
    if over_ranks and (ONLY == ALL or ONLY == HOME):
        note(box, stamp)


# The same arguments, and ``embed`` for the type of its numbers.
@triton.jit(do_not_specialize=["rank", "first_expert", "held", "first", "last"])
def serve(
    table, count, embed, post, rank, first_expert, held, first, last,
    ONLY: tl.constexpr, DENSE: tl.constexpr, MOE: tl.constexpr, s: tl.constexpr,
):  # fmt: skip
    """A step of a rank without a sequence: the exchanges of all layers with experts."""
    kind: tl.constexpr = embed.dtype.element_ty
    apart: tl.constexpr = ONLY != ALL
    meeting: tl.constexpr = 1 if apart else s.programs
    target = begun(count, meeting)
    box = addresses_of(post)
    stamp = exchanges(box)
    for layer in range(first, last):
        of_ffn = addresses(table, layer, FFN, 9)
        moe = MOE
        if MOE and DENSE:
            moe = of_ffn[2] != 0
        if moe:
            stamp += 1
            if ONLY == ALL or ONLY == HAND_OUT:
                hand_out_nothing(box, rank, stamp, s)
            target = _answer(
                of_ffn, box, first_expert, held, rank, stamp, count, target, meeting, ONLY, kind, True, s
            )
    if ONLY == ALL or ONLY == HOME:
        note(box, stamp)


@triton.jit
def _answer(
    at, box, first_expert, held, rank, stamp, count, target, meeting: tl.constexpr, ONLY: tl.constexpr,
    kind: tl.constexpr, fenced: tl.constexpr, s: tl.constexpr,
):  # fmt: skip
    """Compute what all ranks have handed out, and send it home; returns the barrier's new target."""
    if ONLY == ALL or ONLY == CHOICES:
        feed_choices(at, box, first_expert, held, stamp, kind, s)
        arrive(count, meeting)
    if ONLY == ALL or ONLY == HOME:
        target = wait(count, target, meeting)
        send_home(box, first_expert, held, rank, stamp, fenced, s)
    return target
