"""Exchange through the peers' memory: kernels read rows from the peers and write results to the peers.

Every rank has a buffer that its peers can address (NVLink between GPUs of one host). A MoE layer has five steps, and no
step needs a number on the host:

    publish    a rank writes its rows, its choices sorted by expert, and their weights into its buffer
    meet       a rank waits until all ranks have published
    gather     a rank reads the choices of all ranks for its experts, and the rows of these choices, from the peers
    experts    the second product writes each weighted result into the buffer of the rank that the choice came from
    meet       a rank waits until all results have arrived

Shape letters: W ranks, M the most rows that a rank brings, N rows that this rank brings, K choices per row, P = W M K the
most choices of all ranks, E experts in all, e experts held here, D model dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit.nn.experts import Assignment
from moekit.nn.kernels.tiles import most_tiles, write_tiles

# Rows of the smallest mailbox, and of the largest one into which peers write rows.
FEWEST, WRITTEN = 16, 64
# Rows that a program reads from the peers.
PULLED = 4
# Choices that a program copies at a time.
SEGMENT = 256
# The limit of a wait for the peers: in seconds, or in reads of their flags where kernels are interpreted and have no clock.
LIMIT = 120.0
LOOKS = 10_000_000


class Mailbox:
    """The buffer of one rank, and the offsets to the buffers of its peers.

    Attributes:
        x: [M, D], the rows that the experts read.
        order: [M K] int32, the rank's choices sorted by expert.
        starts: [E + 1] int32, the index in ``order`` of the first choice of each expert.
        weights: [M K] float32.
        home: [M, K, D], the weighted output of the expert for each choice.
        all_x, all_chosen, all_weights: [W, M, D], [W, M K] int32 and [W, M K] float32: the rows of all ranks, and the expert
            (E for none) and the weight of each choice. Where rows are few, each rank writes its own into the buffers of
            all ranks, or of those of its experts; a larger mailbox has none of these.
        flags: [W] int32, the number of signals from each peer: one at each :func:`meet`, and M + 1 in a layer of batch_peers.py.
        reach: [W] int64, bytes from this rank's buffer to the buffer of each rank.
        times: [1] int32, the number of signals of this rank: what all flags are at once every rank has come as far.
        gave_up: [1] int32, not 0 after a wait of this rank has taken longer than ``limit``; all mailboxes share it.
        ways, limit: launch options and the time limit of the kernels that wait for peers.
    """

    @staticmethod
    def layout(rows: int, choices: int, experts: int, dim: int, dtype: torch.dtype, world_size: int):
        """(name, shape, dtype) of each part, in the order of the parts in the buffer."""
        all_rows = world_size * rows if rows <= WRITTEN else 0
        return (
            ("flags", (world_size,), torch.int32),
            ("x", (rows, dim), dtype),
            ("order", (rows * choices,), torch.int32),
            ("starts", (experts + 1,), torch.int32),
            ("weights", (rows * choices,), torch.float32),
            ("home", (rows, choices, dim), dtype),
            ("all_x", (all_rows, dim), dtype),
            ("all_chosen", (all_rows * choices,), torch.int32),
            ("all_weights", (all_rows * choices,), torch.float32),
        )

    @classmethod
    def size(cls, *how) -> int:
        """Bytes of a buffer; the arguments are those of :meth:`layout`."""
        return sum(_padded(shape, dtype) for _, shape, dtype in cls.layout(*how))

    def __init__(self, buffer: Tensor, reach: Tensor, rank: int, gave_up: Tensor, how: tuple):
        self.rows, self.choices, self.experts, self.dim, self.dtype, self.world_size = how
        self.rank, self.reach, self.buffer = rank, reach, buffer
        self.times, self.gave_up = torch.zeros_like(gave_up), gave_up
        timed = buffer.is_cuda
        self.ways = {
            "W": self.world_size,
            "RANKS": triton.next_power_of_2(self.world_size),
            "TIMED": timed,
        }
        self.limit = int(LIMIT * 1e9) if timed else LOOKS
        at = 0
        for name, shape, dtype in self.layout(*how):
            size = shape.numel() if isinstance(shape, torch.Size) else torch.Size(shape).numel()
            setattr(self, name, buffer[at : at + size * dtype.itemsize].view(dtype).view(shape))
            at += _padded(shape, dtype)


class Home(NamedTuple):
    """Where results go: choice c of rank r has the number r ``room`` + c, and its rank's memory is ``reach`` [W] bytes away."""

    reach: Tensor
    room: int


def _padded(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    size = torch.Size(shape).numel() * dtype.itemsize
    return -(-size // 256) * 256


def publish(box: Mailbox, x: Tensor, assignment: Assignment) -> None:
    """Write this rank's rows, x [N, D], and their choices into its buffer; the result of a dropped choice is set to zero."""
    rows, dim = x.shape
    order, counts, weights = assignment.order, assignment.counts, assignment.weights
    assert rows <= box.rows and len(counts) == box.experts
    _publish[(rows + 1,)](
        x.contiguous(), order.contiguous(), counts.contiguous(), weights.contiguous(), box.x, box.order, box.starts, box.weights, box.home,
        rows,
        E=box.experts, K=box.choices, D=dim,
        BLOCK=triton.next_power_of_2(dim), EXPERTS=triton.next_power_of_2(box.experts), num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _publish(
    x, order, counts, weights, x_out, order_out, starts_out, weights_out, home, rows,
    E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    if row == rows:
        count = tl.load(counts + expert, mask=expert < E, other=0).to(tl.int32)
        ends = tl.cumsum(count, axis=0)
        tl.store(starts_out + expert + 1, ends, mask=expert < E)
        tl.store(starts_out + expert, ends - count, mask=expert == 0)
    else:
        column = tl.arange(0, BLOCK)
        here = column < D
        tl.store(x_out + row * D + column, tl.load(x + row * D + column, mask=here), mask=here)
        for k in tl.static_range(K):
            tl.store(order_out + row * K + k, tl.load(order + row * K + k).to(tl.int32))
            weight = tl.load(weights + row * K + k).to(tl.float32)
            tl.store(weights_out + row * K + k, weight)
            # A dropped choice has the weight 0, or NaN (NaN times 0), and no expert writes to its place.
            if (weight == 0.0) | (weight != weight):
                nothing = tl.zeros((BLOCK,), dtype=home.dtype.element_ty)
                tl.store(home + (row * K + k) * D + column, nothing, mask=here)


def meet(box: Mailbox) -> None:
    """Wait on the device until every rank has reached this point; what the peers wrote before it can then be read."""
    _meet[(1,)](
        box.flags, box.reach, box.times, box.gave_up, box.rank, box.limit, **box.ways, num_warps=1,
    )  # fmt: skip


@triton.jit
def _ticks(TIMED: tl.constexpr):
    """The time in nanoseconds, or 0 where there is no clock."""
    if TIMED:
        return tl.inline_asm_elementwise(
            "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
        )
    return tl.zeros((), dtype=tl.int64)


@triton.jit(do_not_specialize=["rank", "limit"])
def _meet(
    flags, reach, times, gave_up, rank, limit, W: tl.constexpr, RANKS: tl.constexpr, TIMED: tl.constexpr
):
    wait_for_peers(flags, reach, times, gave_up, rank, limit, W, RANKS, TIMED)


@triton.jit
def wait_for_peers(
    flags, reach, times, gave_up, rank, limit, W: tl.constexpr, RANKS: tl.constexpr, TIMED: tl.constexpr
):
    """Signal to all peers that this rank has reached this point, and wait for them; called in a kernel of one program.

    After it, the peers can read what this program and earlier kernels wrote, and this rank can read what they wrote.
    """
    now = tl.load(times) + 1
    signal(flags, reach, now, rank, W, RANKS)
    tl.store(times, now)
    until(flags, now, gave_up, limit, W, RANKS, TIMED)


@triton.jit
def signal(flags, reach, now, rank, W: tl.constexpr, RANKS: tl.constexpr):
    """Set this rank's flag at all peers to ``now``; then they can read what this program and earlier kernels wrote."""
    peer = tl.arange(0, RANKS)
    there = peer < W
    far = tl.load(reach + peer, mask=there, other=0) // 4
    tl.debug_barrier()
    tl.atomic_xchg(
        flags + far + rank, tl.zeros((RANKS,), dtype=tl.int32) + now, mask=there, sem="release", scope="sys"
    )


# A look at a flag, after which a thread can read what the peer wrote before it raised the flag.
LOOK = tl.constexpr("ld.acquire.sys.global.b32 $0, [$1];")


@triton.jit
def until(flags, now, gave_up, limit, W: tl.constexpr, RANKS: tl.constexpr, TIMED: tl.constexpr):
    """Wait until every peer has signalled ``now`` or more; then this program can read what they wrote before.

    Any number of programs may wait at once. After a wait that gave up, no other one takes long.
    """
    peer = tl.minimum(tl.arange(0, RANKS), W - 1)
    begun = _ticks(TIMED)
    looks = tl.zeros((), dtype=tl.int64)
    waiting = tl.load(gave_up) == 0
    while waiting:
        if TIMED:
            at = (flags + peer).to(tl.int64)
            seen = tl.inline_asm_elementwise(LOOK, "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1)
        else:
            seen = tl.load(flags + peer, volatile=True)
        # The difference is compared, since the count may wrap around.
        waiting = tl.max(tl.where(seen - now < 0, 1, 0), axis=0) != 0
        looks += 1
        if waiting:
            spent = _ticks(TIMED) - begun if TIMED else looks
            if spent > limit:
                tl.store(gave_up, 1)
                waiting = False
    tl.debug_barrier()


def gather(
    box: Mailbox, first: int, held: int, rows: int, tile_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The choices of all ranks for the experts held here, and their rows.

    Args:
        first, held: the experts held here, one or more.
        rows: the most rows that any rank brings; the mailbox may have room for more.
        tile_rows: the most choices of a tile.

    Returns:
        rows [P, D] and weights [P] float32 in the order of ``order``; order [P] int32, the choices of all ranks sorted by
        expert, where choice c of rank r has the number r M K + c; and their tiles as in :func:`moekit.nn.kernels.tiles.tiles`.
        Rows, weights and order of no tile are undefined.
    """
    most = box.world_size * rows * box.choices
    device = box.x.device
    order = torch.empty(most, dtype=torch.int32, device=device)
    table = torch.empty(3, most_tiles(most, held, tile_rows), dtype=torch.int32, device=device)
    total = torch.empty(1, dtype=torch.int32, device=device)
    found = torch.empty(most, box.dim, dtype=box.dtype, device=device)
    weights = torch.empty(most, dtype=torch.float32, device=device)
    _merge[(held + 1, box.world_size)](
        box.order, box.starts, box.reach, order, table, total, first, held, box.rows * box.choices, table.shape[1],
        W=box.world_size, RANKS=box.ways["RANKS"], EXPERTS=triton.next_power_of_2(held), ROWS=tile_rows, SEGMENT=SEGMENT,
        num_warps=4,
    )  # fmt: skip
    _pull[(triton.cdiv(most, PULLED),)](
        box.x, box.weights, box.reach, order, total, found, weights, box.rows * box.choices,
        K=box.choices, D=box.dim, ROWS=PULLED, BLOCK=triton.next_power_of_2(box.dim), num_warps=4,
    )  # fmt: skip
    return found, weights, order, table


@triton.jit(do_not_specialize=["first", "held", "room", "width"])
def _merge(
    order, starts, reach, out, table, total, first, held, room, width,
    W: tl.constexpr, RANKS: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Each program copies the choices of one rank for one expert; those of rank 0 write the tiles, too."""
    mine = tl.program_id(0)
    rank = tl.program_id(1)
    peer = tl.arange(0, RANKS)[:, None]
    expert = tl.arange(0, EXPERTS)[None, :]
    real = (peer < W) & (expert < held)
    far = tl.load(reach + peer, mask=peer < W, other=0) // 4
    at = starts + far + first + expert
    # [RANKS, EXPERTS], the number of choices.
    n = tl.load(at + 1, mask=real, other=0) - tl.load(at, mask=real, other=0)
    count = tl.sum(n, axis=0)
    target = tl.sum(tl.where(tl.arange(0, EXPERTS) < mine, count, 0), axis=0)
    here = tl.sum(tl.where(expert == mine, n, 0), axis=1)
    peer = tl.arange(0, RANKS)
    target += tl.sum(tl.where(peer < rank, here, 0), axis=0)
    own = tl.sum(tl.where(peer == rank, here, 0), axis=0)
    if rank == 0:
        write_tiles(table, count, 0, held, width, ROWS, EXPERTS)
        if mine == held:
            tl.store(total, tl.sum(count, axis=0))
    far = tl.load(reach + rank) // 4
    source = tl.load(starts + far + first + mine)
    for done in range(0, own, SEGMENT):
        i = done + tl.arange(0, SEGMENT)
        c = tl.load(order + far + source + i, mask=i < own, other=0)
        tl.store(out + target + i, c + rank * room, mask=i < own)


@triton.jit(do_not_specialize=["room"])
def _pull(
    x, weights, reach, order, total, rows_out, weights_out, room,
    K: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.load(total)
    if tl.program_id(0) * ROWS < n:
        live = i < n
        choice = tl.load(order + i, mask=live, other=0)
        rank = choice // room
        own = choice % room
        far = tl.multiple_of(
            tl.load(reach + rank, mask=live, other=0) // x.dtype.element_ty.primitive_bitwidth * 8, 16
        )
        column = tl.arange(0, BLOCK)
        here = live[:, None] & (column < D)[None, :]
        at = far[:, None] + (own // K).to(tl.int64)[:, None] * D + column[None, :]
        tl.store(
            rows_out + i.to(tl.int64)[:, None] * D + column[None, :],
            tl.load(x + at, mask=here, other=0.0),
            mask=here,
        )
        far4 = tl.load(reach + rank, mask=live, other=0) // 4
        tl.store(weights_out + i, tl.load(weights + far4 + own, mask=live, other=0.0), mask=live)
