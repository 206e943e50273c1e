"""The phases of a decode step in one launch (one_launch.py): what a program does of each.

A phase is two functions. One loads the weights of the program's part, which no program writes, before the program waits for
the phase before; the other one computes.

Shape letters: D model dim, H heads, C head dim, M slots, F width, E experts, V dictionary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moekit.nn.kernels.activations import activate
from moekit.nn.kernels.fetch import fetch
from moekit.nn.kernels.fixed_point import fixed
from moekit.nn.kernels.gate import top
from moekit.nn.kernels.one_byte import numbers, scaled
from moekit.nn.kernels.one_parts import (
    add,
    first_vector,
    normed,
    numbers_of_rows,
    place_of,
    pointer,
    products,
    tile_of_rows,
    tiles_of_columns,
    tiles_of_rows,
    vector,
)
from moekit.symbols import PAD

# The position of a sequence's first token.
FIRST = tl.constexpr(PAD + 1)


@triton.jit
def begin(tokens, embed, positions, lengths, residual, embed_scale, s: tl.constexpr):
    """The token with its position, written to the residual stream by one program."""
    kind: tl.constexpr = embed.dtype.element_ty
    if tl.program_id(0) == 0:
        token, position = tl.load(tokens), tl.load(lengths) + FIRST
        for done in tl.static_range(0, tl.constexpr(s.d), tl.constexpr(s.chunk)):
            at = done + tl.arange(0, s.chunk)
            row = tl.load(embed + token * s.d + at).to(tl.float32) * embed_scale
            if positions is not None:
                # Rounded after each step, as the plain operations are.
                place = tl.load(positions + position * s.d + at).to(kind)
                row = row.to(kind).to(tl.float32) + place.to(tl.float32)
            tl.store(residual + at, fixed(row.to(kind).to(tl.float32)))


@triton.jit
def project_weights(at, kind: tl.constexpr, s: tl.constexpr):
    gain, shift, w, bias = at
    each: tl.constexpr = s.each(3 * s.d)
    tiles = tiles_of_rows(pointer(w, kind), tl.program_id(0), each, 3 * s.d, 1, s)
    biases = numbers_of_rows(pointer(bias, kind), tl.program_id(0), each, 3 * s.d, 1, s)
    return tiles, biases, vector(pointer(gain, kind), s), vector(pointer(shift, kind), s)


@triton.jit
def project(ready, units, qkv, eps, s: tl.constexpr):
    """Norm of the residual stream, chunks [chunk] int64, and queries, keys and values [3 D]."""
    kind: tl.constexpr = qkv.dtype.element_ty
    tiles, biases, gains, shifts = ready
    h = normed(units, gains, shifts, eps, kind, s)
    for group in tl.static_range(len(tiles)):
        column, fits = place_of(tl.program_id(0), s.each(3 * s.d), 3 * s.d, group, 1, s)
        total = products(tiles[group], h, 0, False, s) + biases[group].to(tl.float32)
        tl.store(qkv + column, total.to(kind), mask=fits)


@triton.jit
def attend_weights(item, length, at, kv, slots, layer, s: tl.constexpr):
    """What an item of :func:`attend` begins with: its weights, and the first keys and values; zeros where it is none.

    ``length`` is the number of tokens in the cache.
    """
    kind: tl.constexpr = kv.dtype.element_ty
    w, bias = at
    parts: tl.constexpr = s.d // s.outputs
    there_is = item < s.h * parts
    h = item // parts % s.h
    c = tl.arange(0, triton.next_power_of_2(s.c))
    row = item % parts * s.outputs + tl.arange(0, s.outputs)
    place = row[:, None] * s.d + (h * s.c + c)[None, :]
    m = tl.load(pointer(w, kind) + place, mask=((c < s.c) & there_is)[None, :], other=0.0)
    bias = tl.load(pointer(bias, kind) + row, mask=there_is & (h == 0), other=0.0)
    keys = kv + slots * (layer * 2 * s.h + h) * s.c
    filled = tl.where(there_is, length, 0)
    k, v = _filled(keys, 0, filled, s), _filled(keys + slots * (s.h * s.c), 0, filled, s)
    return m, bias, k, v, length


@triton.jit
def attend(ready, at, here, there, qkv, kv, slots, layer, scale, s: tl.constexpr):
    """Attention of the new token, and the output projection of what each head has seen, added to ``here``.

    An item is one head and some rows of the projection. The first item of a head writes the token's key and value into the
    cache. The last program, which often has no item, sets ``there`` to zero for the sums that follow.
    """
    items: tl.constexpr = s.h * (s.d // s.outputs)
    if tl.program_id(0) < items:
        _attend_item(tl.program_id(0), ready, here, qkv, kv, slots, layer, scale, s)
    if items > s.programs:
        length = ready[4]
        for item in range(tl.program_id(0) + s.programs, items, s.programs):
            ready = attend_weights(item, length, at, kv, slots, layer, s)
            _attend_item(item, ready, here, qkv, kv, slots, layer, scale, s)
    if tl.program_id(0) == s.programs - 1:
        for done in range(0, s.d, s.chunk):
            tl.store(there + done + tl.arange(0, s.chunk), tl.zeros((tl.constexpr(s.chunk),), dtype=tl.int64))


@triton.jit
def _attend_item(item, ready, here, qkv, kv, slots, layer, scale, s: tl.constexpr):
    kind: tl.constexpr = qkv.dtype.element_ty
    parts: tl.constexpr = s.d // s.outputs
    h = item // parts
    part = item % parts
    m, bias, k, v, length = ready
    c = tl.arange(0, triton.next_power_of_2(s.c))
    real = c < s.c
    new = qkv + h * s.c + c
    q = tl.load(new, mask=real, other=0.0).to(tl.float32) * scale
    key = tl.load(new + s.h * s.c, mask=real, other=0.0)
    value = tl.load(new + 2 * s.h * s.c, mask=real, other=0.0)
    keys = kv + slots * (layer * 2 * s.h + h) * s.c
    values = keys + slots * (s.h * s.c)
    # An online softmax; other than in attention.py, the new token comes first.
    best = tl.sum(q * key.to(tl.float32), axis=0)
    total = best * 0.0 + 1.0
    found = value.to(tl.float32)
    best, total, found = _looked(q, k, v, 0, length, best, total, found, s)
    for done in range(s.slots, length, s.slots):
        k, v = _filled(keys, done, length, s), _filled(values, done, length, s)
        best, total, found = _looked(q, k, v, done, length, best, total, found, s)
    seen = (found / total).to(kind).to(tl.float32)
    row = part * s.outputs + tl.arange(0, s.outputs)
    result = tl.sum(m.to(tl.float32) * seen[None, :], axis=1) + bias.to(tl.float32)
    tl.atomic_add(here + row, fixed(result), sem="relaxed")
    if part == 0:
        tl.store(keys + length * s.c + c, key, mask=real)
        tl.store(values + length * s.c + c, value, mask=real)


@triton.jit
def _looked(q, k, v, first, length, best, total, found, s: tl.constexpr):
    """The softmax after the keys and values from slot ``first`` on: the best score, and sums relative to it."""
    slot = first + tl.arange(0, s.slots)
    score = tl.where(slot < length, tl.sum(k.to(tl.float32) * q[None, :], axis=1), float("-inf"))
    greatest = tl.maximum(best, tl.max(score, axis=0))
    share, fade = tl.exp(score - greatest), tl.exp(best - greatest)
    found = found * fade + tl.sum(share[:, None] * v.to(tl.float32), axis=0)
    return greatest, total * fade + tl.sum(share, axis=0), found


@triton.jit
def _filled(rows, first, length, s: tl.constexpr):
    """Keys or values [slots, head dim] from a slot on, zeros from slot ``length`` on."""
    slot = first + tl.arange(0, s.slots)
    c = tl.arange(0, triton.next_power_of_2(s.c))
    there = (slot < length)[:, None] & (c < s.c)[None, :]
    return tl.load(rows + slot[:, None] * s.c + c[None, :], mask=there, other=0.0)


@triton.jit
def gate_weights(at, kind: tl.constexpr, s: tl.constexpr):
    tiles = tiles_of_rows(pointer(at[2], kind), tl.program_id(0), s.each(s.e), s.e, 1, s)
    return tiles, vector(pointer(at[0], kind), s), vector(pointer(at[1], kind), s)


@triton.jit
def ask_gate(ready, here, logits, eps, s: tl.constexpr):
    """Norm and the gate's logits [E]; returns the normed row as chunks, for the experts."""
    kind: tl.constexpr = logits.dtype.element_ty
    tiles, gains, shifts = ready
    row = normed(vector(here, s), gains, shifts, eps, kind, s)
    for group in tl.static_range(len(tiles)):
        expert, fits = place_of(tl.program_id(0), s.each(s.e), s.e, group, 1, s)
        total = products(tiles[group], row, 0, False, s)
        tl.store(logits + expert, total.to(kind), mask=fits)
    return row


@triton.jit
def normed_row(at, here, eps, kind: tl.constexpr, s: tl.constexpr):
    """What :func:`ask_gate` returns, where each phase is a launch of its own."""
    gains, shifts = vector(pointer(at[0], kind), s), vector(pointer(at[1], kind), s)
    return normed(vector(here, s), gains, shifts, eps, kind, s)


@triton.jit
def chosen(logits, gate_eps, s: tl.constexpr):
    """The gate's choice by the logits [E]: both experts, and their weights, rounded as the logits are, in float32."""
    kind: tl.constexpr = logits.dtype.element_ty
    expert = tl.arange(0, triton.next_power_of_2(s.e))[None, :]
    asked = tl.load(logits + expert, mask=expert < s.e, other=float("-inf")).to(tl.float32)
    _, first, second, _, _, one, two = top(asked, gate_eps, s.e, s.k, s.half, s.brain)
    one, two = one.to(kind).to(tl.float32), two.to(kind).to(tl.float32)
    return tl.sum(first, axis=0), tl.sum(second, axis=0), tl.sum(one, axis=0), tl.sum(two, axis=0)


@triton.jit
def feed_weights(at, kind: tl.constexpr, s: tl.constexpr):
    gain, shift, _, w1, b1, _, w2, b2, _ = at
    program = tl.program_id(0)
    each: tl.constexpr = s.units(s.programs)
    ups = tiles_of_rows(pointer(w1, kind), program, each, s.f, s.group, s)
    biases = numbers_of_rows(pointer(b1, kind), program, each, s.f, s.group, s)
    downs = tiles_of_columns(pointer(w2, kind), program, each, s)
    gains, shifts = vector(pointer(gain, kind), s), vector(pointer(shift, kind), s)
    return ups, biases, downs, first_vector(pointer(b2, kind), program, s), gains, shifts


@triton.jit
def feed(ready, here, there, eps, kind: tl.constexpr, s: tl.constexpr):
    """A dense layer: ``there`` is ``here`` and the result. A program computes some units and their part of the result."""
    ups, biases, downs, last, gains, shifts = ready
    if tl.program_id(0) * s.units(s.programs) < s.f:
        start = first_vector(here, tl.program_id(0), s)
        row = normed(vector(here, s), gains, shifts, eps, kind, s)
        sums = _made((ups, biases, biases, downs, last), row, 0, False, kind, s)
        add(there, start, sums, 1.0, s)


@triton.jit
def feed_experts(at, row, here, there, logits, gate_eps, s: tl.constexpr):
    """The same with the experts that the logits choose. Each program makes the whole choice; of two, it computes one."""
    kind: tl.constexpr = logits.dtype.element_ty
    first, second, one, two = chosen(logits, gate_eps, s)
    # Of K choices, each has its programs; with a single program, one choice follows the other.
    together: tl.constexpr = s.of_a_choice
    for turn in range(tl.program_id(0), together * s.k, s.programs):
        program = turn % together
        if program * s.units(s.of_a_choice) < s.f:
            expert, weight = tl.where(turn < together, first, second), tl.where(turn < together, one, two)
            part = expert_part(at, expert.to(tl.int64), program, kind, s)
            start = first_vector(here, turn, s)
            add(there, start, fed(part, row, kind, s), weight, s)


@triton.jit
def expert_part(at, expert, program, kind: tl.constexpr, s: tl.constexpr):
    """What :func:`fed` needs of an expert: the part of ``program`` among the programs of a choice."""
    stored: tl.constexpr = tl.int8 if s.one_byte > 0 else kind
    _, _, _, w1, b1, scale1, w2, b2, scale2 = at
    each: tl.constexpr = s.units(s.of_a_choice)
    ups = tiles_of_rows(pointer(w1, stored) + expert * (s.f * s.d), program, each, s.f, s.group, s)
    downs = tiles_of_columns(pointer(w2, stored) + expert * (s.f * s.d), program, each, s)
    biases = numbers_of_rows(pointer(b1, kind) + expert * s.f, program, each, s.f, s.group, s)
    scales = biases
    if s.one_byte > 0:
        scales = numbers_of_rows(
            pointer(scale1, tl.float32) + expert * s.f, program, each, s.f, s.group, s
        ) + vector(pointer(scale2, tl.float32) + expert * s.d, s)
    last = first_vector(pointer(b2, kind) + expert * s.d, program, s)
    return ups, biases, scales, downs, last


@triton.jit
def finish_weights(gain, shift, output, s: tl.constexpr):
    gains, shifts = (), ()
    if gain is not None:
        gains, shifts = vector(gain, s), vector(shift, s)
    first = tl.program_id(0) * s.each(s.v)
    return gains, shifts, _output_rows(output, first, s)


@triton.jit
def finish(ready, units, output, out, eps, ahead: tl.constexpr, s: tl.constexpr):
    """The last norm, if there is one, of the residual stream, chunks [chunk] int64, and the logits [V] of the dictionary."""
    kind: tl.constexpr = out.dtype.element_ty
    gains, shifts, tiles = ready
    row = normed(units, gains, shifts, eps, kind, s)
    together: tl.constexpr = s.rows * s.warps
    begin = tl.program_id(0) * s.each(s.v)
    end = tl.minimum(begin + s.each(s.v), s.v)
    for first in range(begin, end, together):
        if ahead:
            _fetch_rows(output, first + s.ahead, tl.minimum(first + s.ahead + together, end), s)
        following = _output_rows(output, first + together, s)
        column = first + tl.arange(0, s.rows)[:, None] * s.warps + tl.arange(0, s.warps)[None, :]
        total = products(tiles, row, 0, False, s)
        tl.store(out + column, total.to(kind), mask=column < end)
        tiles = following


@triton.jit
def _output_rows(output, first, s: tl.constexpr):
    """Rows [rows, warps] of the output matrix, of the program's alone."""
    column = first + tl.arange(0, s.rows)[:, None] * s.warps + tl.arange(0, s.warps)[None, :]
    end = tl.minimum((tl.program_id(0) + 1) * s.each(s.v), s.v)
    return tile_of_rows(output, column, column < end, s)


@triton.jit
def _made(
    ready, row, one_byte: tl.constexpr, ptx: tl.constexpr, kind: tl.constexpr, s: tl.constexpr,
):  # fmt: skip
    """What the program's units make of a row, as chunks [chunk]. ``scales``, if one_byte: of the units, then those of D."""
    ups, biases, scales, downs, last = ready
    sums = ()
    for group in tl.static_range(len(ups)):
        hidden = products(ups[group], row, one_byte, ptx, s)
        if one_byte > 0:
            hidden = scaled(hidden, scales[group], one_byte)
        hidden = activate(hidden + biases[group].to(tl.float32), s.activation, s.exact).to(kind)
        hidden = tl.reshape(hidden, (hidden.shape[0] * hidden.shape[1],)).to(tl.float32)[None, :]
        found = ()
        for i in tl.static_range(len(last)):
            part = numbers(downs[group][i], one_byte, ptx).to(tl.float32) * hidden
            if group > 0:
                part += sums[i]
            found = found + (part,)
        sums = found
    found = ()
    for i in tl.static_range(len(last)):
        total = tl.sum(sums[i], axis=1)
        if one_byte > 0:
            total = scaled(total, scales[len(ups) + i], one_byte)
        found = found + (total + last[i].to(tl.float32),)
    return found


@triton.jit
def fed(ready, row, kind: tl.constexpr, s: tl.constexpr):
    """What an expert's units make of a row."""
    return _made(ready, row, s.one_byte, s.ptx, kind, s)


@triton.jit
def fetch_output(output, s: tl.constexpr):
    """Fetch the first rows of the output matrix that the program will read."""
    first = tl.program_id(0) * s.each(s.v)
    _fetch_rows(output, first, tl.minimum(first + s.ahead, tl.minimum(first + s.each(s.v), s.v)), s)


@triton.jit
def _fetch_rows(w, first, end, s: tl.constexpr):
    width: tl.constexpr = s.d * w.dtype.element_ty.primitive_bitwidth // 8
    fetch(w + first * s.d, tl.maximum(end - first, 0) * width)
