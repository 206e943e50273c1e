"""A layer of experts in a decode step in one launch (one_launch.py) where several ranks share the experts.

Each rank has one sequence or none, and all run the kernel at the same time. A mailbox is that of peers.py, and a write to a
peer's mailbox does not wait for its way there and back, as a read does. In place of the experts' phase, and of the barrier
behind it, a layer has:

    hand out   for each peer a program writes the row, its choices and their weights to the peer, and raises its flag there
    meet       each program waits for the flags of all ranks
    experts    the programs compute the choices that fall on the rank's experts, whose sequences are any rank's
    barrier    of the rank's programs
    send home  for each peer a program writes the sums of the peer's choices to the peer, and raises its flag there
    meet       each program waits again; it then finds the sums of its own rank's choices in the mailbox

No program of a rank overwrites what a peer may still read: it hands out a row after the peer has sent home the sums of the row
before, and sends sums home after the peer has handed out the next row.

Shape letters: W ranks, K choices a token, D model dim, F width, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit.nn.kernels.grid_barrier import LOOKS
from moekit.nn.kernels.one_parts import add, pointer, vector
from moekit.nn.kernels.one_phases import chosen, feed_expert
from moekit.nn.kernels.peers import Mailbox

# Each of the first $3 threads looks at its flag, of those at $1, until it is $2 or later, $4 times at most; then it sets the
# number at $5, which ends all later waits. Flags are compared by their difference, since the count may wrap around.
MEET = tl.constexpr(
    """
    {
    .reg .pred ends;
    .reg .b32 thread, looks, flag, stuck;
    .reg .b64 at;
    mov.u32 thread, %tid.x;
    setp.ge.u32 ends, thread, $3;
    @ends bra done;
    mul.wide.u32 at, thread, 4;
    add.u64 at, at, $1;
    mov.u32 looks, 0;
    look:
    ld.relaxed.gpu.global.b32 stuck, [$5];
    ld.acquire.sys.global.b32 flag, [at];
    sub.s32 flag, flag, $2;
    setp.ge.s32 ends, flag, 0;
    @ends bra done;
    setp.ne.b32 ends, stuck, 0;
    @ends bra done;
    add.u32 looks, looks, 1;
    setp.lt.u32 ends, looks, $4;
    @ends bra look;
    red.relaxed.gpu.global.or.b32 [$5], 1;
    done:
    bar.warp.sync 0xffffffff;
    mov.u32 $0, 0;
    }
    """
)

# The columns of a table of addresses: those of the mailbox's parts, of the sums of all choices, and of what a wait needs.
X, CHOSEN, WEIGHTS, HOME, FLAGS, REACH, TIMES, GAVE_UP, SUMS, PARTS = map(tl.constexpr, range(10))


def addresses(box: Mailbox, sums: Tensor) -> list[int]:
    """The columns; ``sums`` is [W K, D] int64, zeros, as they are again after each layer."""
    parts = (
        box.all_x,
        box.all_chosen,
        box.all_weights,
        box.home_sums,
        box.flags,
        box.reach,
        box.times,
        box.gave_up,
        sums,
    )
    return [part.data_ptr() for part in parts]


def room(box: Mailbox) -> Tensor:
    return torch.zeros(box.world_size * box.choices, box.dim, dtype=torch.long, device=box.x.device)


@triton.jit
def mailbox(table):
    """The addresses; asked for long before they are used."""
    found = ()
    for i in tl.static_range(PARTS):
        found = found + (tl.load(table + i),)
    return found


@triton.jit
def met(box):
    """How often the ranks have met before this kernel."""
    return tl.load(pointer(box[TIMES], tl.int32))


@triton.jit
def note(box, times):
    """Write down how often they have met; every program has called :func:`met`."""
    if tl.program_id(0) == 0:
        tl.store(pointer(box[TIMES], tl.int32), times)


@triton.jit
def hand_out(box, row, logits, gate_eps, rank, times, alone: tl.constexpr, s: tl.constexpr):
    """Write the row, chunks [1, chunk], and what the gate chooses by ``logits`` [E], to all ranks.

    ``alone``: programs only write, and the ranks meet between two launches.
    """
    kind: tl.constexpr = logits.dtype.element_ty
    if tl.program_id(0) < s.ranks:
        first, second, one, two = chosen(logits, gate_eps, s)
        for peer in range(tl.program_id(0), s.ranks, s.programs):
            far = tl.load(pointer(box[REACH], tl.int64) + peer)
            for i in tl.static_range(len(row)):
                column = i * s.chunk + tl.arange(0, s.chunk)[None, :]
                tl.store(pointer(box[X] + far, kind) + rank * s.d + column, row[i].to(kind))
            own = rank * s.k
            tl.store(pointer(box[CHOSEN] + far, tl.int32) + own, first.to(tl.int32))
            tl.store(pointer(box[WEIGHTS] + far, tl.float32) + own, one)
            if s.k == 2:
                tl.store(pointer(box[CHOSEN] + far, tl.int32) + own + 1, second.to(tl.int32))
                tl.store(pointer(box[WEIGHTS] + far, tl.float32) + own + 1, two)
            if not alone:
                _raise_flag(box, far, rank, times)


@triton.jit
def hand_out_nothing(box, rank, times, alone: tl.constexpr, s: tl.constexpr):
    """Tell all ranks that this one has no sequence."""
    for peer in range(tl.program_id(0), s.ranks, s.programs):
        far = tl.load(pointer(box[REACH], tl.int64) + peer)
        for k in tl.static_range(tl.constexpr(s.k)):
            tl.store(pointer(box[CHOSEN] + far, tl.int32) + rank * s.k + k, s.e)
        if not alone:
            _raise_flag(box, far, rank, times)


@triton.jit
def _raise_flag(box, far, rank, times):
    """Say at a peer that this program has written all that it had for the peer."""
    tl.debug_barrier()
    flag = pointer(box[FLAGS] + far, tl.int32) + rank
    tl.atomic_xchg(flag, times, sem="release", scope="sys")


@triton.jit
def meet(box, times, s: tl.constexpr):
    """Wait until all ranks have raised their flags ``times`` times; what they wrote before can then be read."""
    tl.inline_asm_elementwise(
        MEET,
        "=r,l,r,r,r,l",
        [box[FLAGS], times, tl.constexpr(s.ranks), LOOKS, box[GAVE_UP]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.debug_barrier()


@triton.jit
def feed_choices(at, box, first, held, kind: tl.constexpr, s: tl.constexpr):
    """Add up what the ``held`` experts here, from number ``first`` on, make of the rows that chose them.

    A program takes the same units of an expert as with one rank, so that each sum has the same parts.
    """
    number = tl.arange(0, triton.next_power_of_2(s.ranks * s.k))
    asked = tl.load(
        pointer(box[CHOSEN], tl.int32) + number, mask=number < s.ranks * s.k, other=tl.constexpr(s.e)
    )
    mine = (asked >= first) & (asked < first + held)
    place = tl.cumsum(mine.to(tl.int32), axis=0) - 1
    programs: tl.constexpr = s.of_a_choice
    for turn in range(tl.program_id(0), tl.sum(mine.to(tl.int32), axis=0) * programs, s.programs):
        program = turn % programs
        if program * s.units(s.of_a_choice) < s.f:
            this = mine & (place == turn // programs)
            choice = tl.sum(tl.where(this, number, 0), axis=0)
            expert = tl.sum(tl.where(this, asked, 0), axis=0) - first
            weight = tl.load(pointer(box[WEIGHTS], tl.float32) + choice)
            row = ()
            for i in tl.static_range(0, tl.constexpr(s.d), tl.constexpr(s.chunk)):
                x = pointer(box[X], kind) + choice // s.k * s.d + i + tl.arange(0, s.chunk)
                row = row + (tl.load(x).to(tl.float32)[None, :],)
            sums = feed_expert(at, expert.to(tl.int64), row, program, kind, s)
            add(pointer(box[SUMS], tl.int64) + choice * s.d, (), sums, weight, s)


@triton.jit
def send_home(box, first, held, rank, times, alone: tl.constexpr, s: tl.constexpr):
    """Write the sums of this rank's experts to the ranks of their sequences, and set them to zero."""
    for peer in range(tl.program_id(0), s.ranks, s.programs):
        far = tl.load(pointer(box[REACH], tl.int64) + peer)
        for k in tl.static_range(tl.constexpr(s.k)):
            choice = peer * s.k + k
            asked = tl.load(pointer(box[CHOSEN], tl.int32) + choice)
            if (asked >= first) & (asked < first + held):
                for done in tl.static_range(0, tl.constexpr(s.d), tl.constexpr(s.chunk)):
                    column = done + tl.arange(0, s.chunk)
                    mine = pointer(box[SUMS], tl.int64) + choice * s.d + column
                    tl.store(pointer(box[HOME] + far, tl.int64) + k * s.d + column, tl.load(mine))
                    tl.store(mine, tl.zeros((tl.constexpr(s.chunk),), dtype=tl.int64))
        if not alone:
            _raise_flag(box, far, rank, times)


@triton.jit
def arrived(x, box, coming, s: tl.constexpr):
    """x [D] int64, and the sums that have come home if ``coming`` is not 0, as chunks [chunk]."""
    units = vector(x, s)
    if box is not None:
        for k in tl.static_range(tl.constexpr(s.k)):
            found = ()
            for i in tl.static_range(len(units)):
                more = pointer(box[HOME], tl.int64) + k * s.d + i * s.chunk + tl.arange(0, s.chunk)
                found = found + (units[i] + tl.load(more, mask=coming != 0, other=0),)
            units = found
    return units


@triton.jit
def settle(here, units, coming, s: tl.constexpr):
    """Write the residual stream with the sums that have come home; the last program does it."""
    if (coming != 0) & (tl.program_id(0) == s.programs - 1):
        for i in tl.static_range(len(units)):
            tl.store(here + i * s.chunk + tl.arange(0, s.chunk), units[i])
