"""A layer of experts in a decode step in one launch (one_launch.py) where several ranks share the experts.

Each rank has one sequence or none, and all ranks run the kernel at the same time. In place of the experts' phase a layer has:

    hand out   for each peer a program writes the row, its choices and their weights to the peer
    experts    the programs wait for the choices of all ranks, and compute those that fall on the rank's experts
    send home  for each peer a program writes the sums of the peer's choices to the peer

The next phase waits for the sums of the rank's own choices. No signal follows what is written: a number travels in a word of 64
bits whose other half is the number of the exchange, the *stamp*, and a program looks at a word until it has the right stamp. So
nothing waits for a write to arrive before a signal may be sent, which takes as long as the way itself.

Warps of a program that look at the same word may see it at different times. So one warp looks at a word of a row (:func:`warps_of`).
Each warp looks at the words of all choices, and goes on by what it saw itself.

No program overwrites what a peer may still read. Behind the barrier of its programs, a rank acknowledges the exchange to all
others, and none of them hands out its next row before. The sums go home after the next row came, so the sums before them have
been read.

Shape letters: W ranks, K choices a token, D model dim, E experts.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit.nn.kernels.fixed_point import fixed, floating
from moekit.nn.kernels.grid_barrier import LOOKS
from moekit.nn.kernels.one_parts import add, pointer, vector
from moekit.nn.kernels.one_phases import chosen, expert_part, fed
from moekit.nn.kernels.peer_dispatch import PeerDispatch
from moekit.nn.peer_memory import symmetric

# The columns of the table of addresses: parts of a rank's buffer, which peers write, and what no peer knows.
AT_CHOICES, AT_WEIGHTS, AT_ROWS, AT_HOME, AT_SEEN, AT_REACH, AT_SUMS, AT_STAMP, AT_GAVE_UP, COLUMNS = map(
    tl.constexpr, range(10)
)
# The threads of a warp.
WARP = 32
# Looks from one question whether a wait has given up to the next; each takes as long as a look.
BETWEEN = tl.constexpr(64)


class Post(NamedTuple):
    """What ranks exchange through, on the device of one rank.

    Attributes:
        table: [COLUMNS] int64, the addresses of the columns.
        buffer: those of choices and weights [W, K], rows [W, D], sums that came home [K, D], all words of 64 bits, and of the
            last exchange [W] int32 that each rank has acknowledged.
        reach: [W] int64, bytes from this rank's buffer to the buffer of each rank.
        sums: [W K, D] int64, of the choices of all ranks; zeros between two exchanges.
        stamp: [1] int32, the number of exchanges so far.
    """

    table: Tensor
    buffer: Tensor
    reach: Tensor
    sums: Tensor
    stamp: Tensor


def fits(dispatch: PeerDispatch) -> bool:
    """Whether a warp can look at the choices of all ranks, a thread at each."""
    choices, *_, ranks = dispatch.of
    return ranks * choices <= WARP


def warps_of(chunk: int) -> int:
    """The warps of a program, of which no two look at the same word of a chunk."""
    return max(chunk // WARP, 1)


_posts: weakref.WeakKeyDictionary[PeerDispatch, Post] = weakref.WeakKeyDictionary()


def post_of(dispatch: PeerDispatch) -> Post:
    """The ranks' :class:`Post`; the first call is a collective."""
    if dispatch not in _posts:
        choices, _, dim, _, ranks = dispatch.of
        device, words = dispatch.device, [ranks * choices] * 2 + [ranks * dim, choices * dim]
        # Each part begins at 16 bytes, which the kernels tell the compiler.
        words = [count + count % 2 for count in words]
        buffer, reach = symmetric(8 * sum(words) + 4 * ranks, device)
        sums = torch.zeros(ranks * choices, dim, dtype=torch.long, device=device)
        stamp = torch.zeros(1, dtype=torch.int32, device=device)
        starts = [buffer.data_ptr() + 8 * sum(words[:part]) for part in range(len(words) + 1)]
        others = [one.data_ptr() for one in (reach, sums, stamp, dispatch.gave_up)]
        table = torch.tensor(starts + others, device=device)
        _posts[dispatch] = Post(table, buffer, reach, sums, stamp)
    return _posts[dispatch]


@triton.jit
def addresses_of(table):
    """The columns; asked for long before they are used."""
    found = ()
    for i in tl.static_range(COLUMNS):
        found = found + (tl.load(table + i),)
    return found


@triton.jit
def exchanges(box):
    """The number of exchanges before this kernel."""
    return tl.load(pointer(box[AT_STAMP], tl.int32))


@triton.jit
def note(box, stamp):
    """Write down the number of exchanges; every program has asked for it before."""
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(pointer(box[AT_STAMP], tl.int32), stamp)


@triton.jit
def _words(bits, stamp):
    """Words of 64 bits with numbers of 32 bits, and the stamp."""
    return (stamp.to(tl.int64) << 32) | (bits.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def _bits(words):
    return (words & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _floats(words):
    return _bits(words).to(tl.float32, bitcast=True)


@triton.jit
def _late(words, stamp):
    """1 for each word that has another stamp, else 0."""
    return ((words >> 32).to(tl.int32) != stamp).to(tl.int32)


@triton.jit
def _goes_on(looks, late, box):
    """Whether to look again: something is late, and neither this wait nor an earlier one has lasted too long."""
    waiting = late != 0
    if waiting & (looks % BETWEEN == BETWEEN - 1):
        if looks >= LOOKS:
            tl.store(pointer(box[AT_GAVE_UP], tl.int32), 1)
        waiting = tl.load(pointer(box[AT_GAVE_UP], tl.int32), volatile=True) == 0
    return waiting


@triton.jit
def hand_out(box, row, logits, gate_eps, rank, stamp, s: tl.constexpr):
    """Write the row, chunks [1, chunk], and what the gate chooses by ``logits`` [E], to all ranks."""
    if tl.program_id(0) < s.ranks:
        _await_acknowledged(box, stamp - 1, s)
        for peer in range(tl.program_id(0), s.ranks, s.programs):
            far = tl.load(pointer(box[AT_REACH], tl.int64) + peer)
            for i in tl.static_range(len(row)):
                column = i * s.chunk + tl.arange(0, s.chunk)[None, :]
                tl.store(pointer(box[AT_ROWS] + far, tl.int64) + rank * s.d + column, _words(row[i], stamp))
        first, second, one, two = chosen(logits, gate_eps, s)
        for peer in range(tl.program_id(0), s.ranks, s.programs):
            far = tl.load(pointer(box[AT_REACH], tl.int64) + peer)
            choices = pointer(box[AT_CHOICES] + far, tl.int64) + rank * s.k
            weights = pointer(box[AT_WEIGHTS] + far, tl.int64) + rank * s.k
            tl.store(choices, _words(first.to(tl.int32), stamp))
            tl.store(weights, _words(one, stamp))
            if s.k == 2:
                tl.store(choices + 1, _words(second.to(tl.int32), stamp))
                tl.store(weights + 1, _words(two, stamp))


@triton.jit
def hand_out_nothing(box, rank, stamp, s: tl.constexpr):
    """Tell all ranks that this one has no sequence."""
    if tl.program_id(0) < s.ranks:
        _await_acknowledged(box, stamp - 1, s)
        nothing = tl.zeros((), dtype=tl.int32) + s.e
        for peer in range(tl.program_id(0), s.ranks, s.programs):
            far = tl.load(pointer(box[AT_REACH], tl.int64) + peer)
            for k in tl.static_range(tl.constexpr(s.k)):
                tl.store(pointer(box[AT_CHOICES] + far, tl.int64) + rank * s.k + k, _words(nothing, stamp))
                tl.store(pointer(box[AT_WEIGHTS] + far, tl.int64) + rank * s.k + k, _words(nothing, stamp))


@triton.jit
def _await_acknowledged(box, stamp, s: tl.constexpr):
    """Wait until all ranks have read what came with ``stamp``."""
    peer = tl.arange(0, triton.next_power_of_2(s.ranks))
    at = pointer(box[AT_SEEN], tl.int32) + peer
    looks, waiting = tl.zeros((), dtype=tl.int32), stamp == stamp
    while waiting:
        seen = tl.load(at, mask=peer < s.ranks, other=0, volatile=True)
        # The difference is compared, since the count may wrap around.
        late = tl.max(tl.where((peer < s.ranks) & (seen - stamp < 0), 1, 0), axis=0)
        waiting = _goes_on(looks, late, box)
        looks += 1


@triton.jit
def feed_choices(at, box, first, held, stamp, kind: tl.constexpr, s: tl.constexpr):
    """Add up what the ``held`` experts here, from number ``first`` on, make of the rows that chose them.

    A program takes the same units of an expert as with one rank, so that each sum has the same parts.
    """
    number = tl.arange(0, triton.next_power_of_2(s.ranks * s.k))
    there, other = number < s.ranks * s.k, _words(tl.zeros((), dtype=tl.int32) + s.e, stamp)
    choices, weights = (
        pointer(box[AT_CHOICES], tl.int64) + number,
        pointer(box[AT_WEIGHTS], tl.int64) + number,
    )
    asked, weight = number.to(tl.int64), number.to(tl.int64)
    looks, waiting = tl.zeros((), dtype=tl.int32), stamp == stamp
    while waiting:
        asked = tl.load(choices, mask=there, other=other, volatile=True)
        weight = tl.load(weights, mask=there, other=other, volatile=True)
        late = tl.max(_late(asked, stamp) | _late(weight, stamp), axis=0)
        waiting = _goes_on(looks, late, box)
        looks += 1
    asked, weight = _bits(asked) - first, _floats(weight)
    mine = (asked >= 0) & (asked < held)
    place = tl.cumsum(mine.to(tl.int32), axis=0) - 1
    together: tl.constexpr = s.of_a_choice
    for turn in range(tl.program_id(0), tl.sum(mine.to(tl.int32), axis=0) * together, s.programs):
        program = turn % together
        if program * s.units(s.of_a_choice) < s.f:
            this = mine & (place == turn // together)
            choice = tl.sum(tl.where(this, number, 0), axis=0)
            expert = tl.sum(tl.where(this, asked, 0), axis=0).to(tl.int64)
            share = tl.sum(tl.where(this, weight, 0.0), axis=0)
            # The row comes after the choices, and may come while the weights are read.
            part = expert_part(at, expert, program, kind, s)
            row = _row(box, choice // s.k, stamp, s)
            add(pointer(box[AT_SUMS], tl.int64) + choice * s.d, (), fed(part, row, kind, s), share, s)


@triton.jit
def _look(at, s: tl.constexpr):
    """D words as chunks [chunk], as they are now."""
    found = ()
    for done in tl.static_range(0, tl.constexpr(s.d), tl.constexpr(s.chunk)):
        found = found + (tl.load(at + done + tl.arange(0, s.chunk), volatile=True),)
    return found


@triton.jit
def _row(box, rank, stamp, s: tl.constexpr):
    """The row of a rank as chunks [1, chunk] float32."""
    at = pointer(box[AT_ROWS], tl.int64) + rank * s.d
    words = _look(at, s)
    looks = tl.zeros((), dtype=tl.int32)
    waiting = _goes_on(looks, _any_late(words, stamp), box)
    while waiting:
        looks += 1
        words = _look(at, s)
        waiting = _goes_on(looks, _any_late(words, stamp), box)
    row = ()
    for i in tl.static_range(len(words)):
        row = row + (_floats(words[i])[None, :],)
    return row


@triton.jit
def _any_late(words, stamp):
    late = _late(words[0], stamp)
    for i in tl.static_range(1, len(words)):
        late = late | _late(words[i], stamp)
    return tl.max(late, axis=0)


@triton.jit
def send_home(box, first, held, rank, stamp, fenced: tl.constexpr, s: tl.constexpr):
    """Write the sums of this rank's experts to the ranks of their sequences, set them to zero, and acknowledge the exchange.

    ``fenced``: no barrier follows before the next exchange, so the zeros have to be seen before the peer goes on.
    """
    for peer in range(tl.program_id(0), s.ranks, s.programs):
        far = tl.load(pointer(box[AT_REACH], tl.int64) + peer)
        for k in tl.static_range(tl.constexpr(s.k)):
            choice = peer * s.k + k
            asked = _bits(tl.load(pointer(box[AT_CHOICES], tl.int64) + choice, volatile=True)) - first
            if (asked >= 0) & (asked < held):
                for done in tl.static_range(0, tl.constexpr(s.d), tl.constexpr(s.chunk)):
                    column = done + tl.arange(0, s.chunk)
                    mine = pointer(box[AT_SUMS], tl.int64) + choice * s.d + column
                    total = floating(tl.load(mine))
                    tl.store(pointer(box[AT_HOME] + far, tl.int64) + k * s.d + column, _words(total, stamp))
                    tl.store(mine, tl.zeros((tl.constexpr(s.chunk),), dtype=tl.int64))
        # All programs here have read what the peer handed out: they are behind a barrier.
        tl.debug_barrier()
        seen = pointer(box[AT_SEEN] + far, tl.int32) + rank
        if fenced:
            tl.atomic_xchg(seen, stamp, sem="release", scope="sys")
        else:
            tl.store(seen, stamp)


@triton.jit
def arrived(x, box, coming, stamp, s: tl.constexpr):
    """x [D] int64, and the sums that come home if ``coming`` is not 0, as chunks [chunk]."""
    units = vector(x, s)
    if box is not None:
        words = _look_home(box, coming, stamp, s)
        looks = tl.zeros((), dtype=tl.int32)
        waiting = _goes_on(looks, _any_late(words, stamp), box)
        while waiting:
            looks += 1
            words = _look_home(box, coming, stamp, s)
            waiting = _goes_on(looks, _any_late(words, stamp), box)
        found = ()
        for i in tl.static_range(len(units)):
            total = units[i]
            for k in tl.static_range(tl.constexpr(s.k)):
                total += fixed(_floats(words[k * len(units) + i]))
            found = found + (total,)
        units = found
    return units


@triton.jit
def _look_home(box, coming, stamp, s: tl.constexpr):
    """The K D words of this rank's sums as chunks [chunk], as they are now; zeros with the right stamp if nothing comes."""
    found = ()
    for done in tl.static_range(0, tl.constexpr(s.k * s.d), tl.constexpr(s.chunk)):
        at = pointer(box[AT_HOME], tl.int64) + done + tl.arange(0, s.chunk)
        found = found + (tl.load(at, mask=coming != 0, other=stamp.to(tl.int64) << 32, volatile=True),)
    return found


@triton.jit
def settle(here, units, coming, s: tl.constexpr):
    """Write the residual stream with the sums that have come home; the last program does it."""
    if (coming != 0) & (tl.program_id(0) == s.programs - 1):
        for i in tl.static_range(len(units)):
            tl.store(here + i * s.chunk + tl.arange(0, s.chunk), units[i])
