"""Caches of experts, for machines that keep the others elsewhere: which requests hit, for every size of cache at once.

A stream is [n] expert numbers in the order of their requests. LRU, LFU and Belady's oracle are all stack algorithms: what
a cache holds is part of what a larger one holds (Mattson et al. 1970). So each request has one rank, and hits in all
caches that are larger than it; one pass gives the hits of all sizes.
"""

from __future__ import annotations

import itertools

import numpy as np

NEVER = np.iinfo(np.int32).max
# requests whose pairs are compared at once
BLOCK = 128
# requests of a stream that the oracle takes one after the other; other pieces run beside them
PIECE = 24_000
# The oracle's run-up before a piece, in requests for each expert of the model.
RUN_UP = 8


def hits(rank: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """How many requests hit in a cache of each size, those with a rank below it."""
    return np.searchsorted(np.sort(rank), sizes)


def lru_distance(stream: np.ndarray) -> np.ndarray:
    """[n]: how many other experts were requested since this one was last; ``NEVER`` at its first request."""
    return _rank(stream, np.arange(len(stream)))


def lfu_rank(stream: np.ndarray) -> np.ndarray:
    """[n]: how many experts come before this one by (requests so far, last request); ``NEVER`` at its first request."""
    number = _number(stream, _previous(stream))
    priority = np.empty(len(stream), dtype=np.int64)
    priority[np.argsort(number, kind="stable")] = np.arange(len(stream))
    return _rank(stream, priority)


def _rank(stream: np.ndarray, priority: np.ndarray) -> np.ndarray:
    """How many experts have a higher priority than the one requested, just before its request; ``NEVER`` at its first.

    A request raises its expert's priority from ``before`` to ``priority``, and no other expert's. Another expert moves
    past priority p with the one request that raises it from p or below to above p. So the experts above p are those above
    it at the start of a block of requests, and the requests of the block so far that moved past it.

    Example, with LRU's priority, the time of the last request (-1: none yet):

        time      0   1   2   3   4
        expert    a   b   c   b   a
        before   -1  -1  -1   1   0

    At time 4 expert a has priority 0. Requests 1 (from -1 to 1) and 2 (from -1 to 2) moved past 0; request 3 (from 1 to 3)
    was above already. So 2 experts come before a: it hits in caches of 3 and more.

    Args:
        priority: [n] int, different numbers of at least 0, that grow with the requests of each expert.
    """
    previous = _previous(stream)
    before = np.where(previous < 0, -1, priority[previous])
    highest = np.full(int(stream.max(initial=-1)) + 1, -1, dtype=np.int64)
    earlier = np.tri(BLOCK, k=-1, dtype=bool)
    rank = np.empty(len(stream), dtype=np.int64)
    for start in range(0, len(stream), BLOCK):
        block = slice(start, start + BLOCK)
        old, new = before[block], priority[block]
        above = len(highest) - np.searchsorted(np.sort(highest), old, side="right")
        passed = (old <= old[:, None]) & (new > old[:, None]) & earlier[: len(old), : len(old)]
        rank[block] = above + passed.sum(axis=1)
        # Of several requests of an expert the last one counts, as NumPy assigns in order.
        highest[stream[block]] = new
    return np.where(previous < 0, NEVER, rank)


def oracle_hits(streams: list[np.ndarray], experts: int, sizes: np.ndarray) -> np.ndarray:
    """The hits of Belady's oracle (1966), which knows the future: when the cache is full, it evicts the expert, cached or
    just requested, whose next use is furthest away. No other policy has more hits.

    A stack of next uses holds the cache of size c in its upper c places. A request comes in on top with its next use; from
    there down to the place where it was, each place keeps the sooner of the two next uses that meet there, and the later
    one moves on down. Example, for the requests a b c a b with their next uses 3 4 - - - ("-": never):

        request   next use   stack after it, top first
        a         3          3
        b         4          3 4      (4 came in and met 3: 3 stays, 4 moves on)
        c         -          3 4 -    (never comes last: it moves on past both)
        a         -          - 4 -    (a was in place 1: a hit for 1 and more)
        b         -          - - -    (b was in place 2: a hit for 2 and more)

    Streams of more than ``PIECE`` requests run in pieces, all at once, each after a run-up of ``RUN_UP`` E requests that
    are not counted. A piece does not know what was requested only before its run-up, which matters to sizes near E alone.

    Args:
        sizes: [C], ascending.

    Returns:
        [streams, C] int64.
    """
    pieces = []
    for number, stream in enumerate(streams):
        cuts = np.linspace(0, len(stream), -(-len(stream) // PIECE) + 1).astype(int)
        pieces += [(number, max(0, a - RUN_UP * experts), a, b) for a, b in itertools.pairwise(cuts)]
    after, counted = _next_uses(streams, pieces)
    never = np.iinfo(after.dtype).max

    stack = np.full((int(sizes[-1]), len(pieces)), never, dtype=after.dtype)
    arriving, spare = np.empty((2, len(stack) + 1, len(pieces)), dtype=after.dtype)
    found = np.empty(stack.shape, dtype=bool)
    # The places of the stack that each size has beyond the size before it.
    parts = list(itertools.pairwise([0, *sizes.tolist()]))
    hit = np.zeros((len(parts), len(pieces)), dtype=np.int64)
    for step in range(len(after)):
        # The expert requested is the one whose next use is now; it leaves its place to what moves down.
        np.equal(stack, step, out=found)
        for part, (top, bottom) in enumerate(parts):
            hit[part] += found[top:bottom].any(axis=0) & counted[step]
        np.copyto(stack, never, where=found)
        arriving[0], arriving[1:] = after[step], stack
        arriving, spare = _running_maximum(arriving, spare)
        np.minimum(arriving[:-1], stack, out=stack)
    total = np.zeros((len(streams), len(parts)), dtype=np.int64)
    np.add.at(total, [number for number, *_ in pieces], hit.T)
    return total.cumsum(axis=1)


def _next_uses(
    streams: list[np.ndarray], pieces: list[tuple[int, int, int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """[steps, pieces]: the next use of each piece's requests, counted from its first; and whether a request counts.

    Args:
        pieces: (stream, first request, first that counts, end) of each.
    """
    steps = max((end - first for _, first, _, end in pieces), default=0)
    dtype = np.int16 if steps < np.iinfo(np.int16).max else np.int32
    never = np.iinfo(dtype).max
    after = np.full((steps, len(pieces)), never, dtype=dtype)
    counted = np.zeros((steps, len(pieces)), dtype=bool)
    following = [_following(stream) for stream in streams]
    for lane, (number, first, start, end) in enumerate(pieces):
        after[: end - first, lane] = np.minimum(following[number][first:end] - first, never)
        counted[start - first : end - first, lane] = True
    return after, counted


def _running_maximum(values: np.ndarray, spare: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``np.maximum.accumulate`` along axis 0 in log2 steps, several times faster; uses up both arrays, and returns both."""
    shift = 1
    while shift < len(values):
        spare[:shift] = values[:shift]
        np.maximum(values[shift:], values[:-shift], out=spare[shift:])
        values, spare = spare, values
        shift *= 2
    return values, spare


def _previous(stream: np.ndarray) -> np.ndarray:
    """[n]: for each request the one before it of the same expert; -1 if there is none."""
    order = np.argsort(stream, kind="stable")
    previous = np.full(len(stream), -1, dtype=np.int64)
    same = stream[order[1:]] == stream[order[:-1]]
    previous[order[1:][same]] = order[:-1][same]
    return previous


def _number(stream: np.ndarray, previous: np.ndarray) -> np.ndarray:
    """[n]: how many requests of the same expert came before each one."""
    order = np.argsort(stream, kind="stable")
    place = np.arange(len(stream))
    start = np.maximum.accumulate(np.where(previous[order] < 0, place, 0))
    number = np.empty(len(stream), dtype=np.int64)
    number[order] = place - start
    return number


def _following(stream: np.ndarray) -> np.ndarray:
    """[n]: for each request the next one of the same expert; ``NEVER`` if there is none."""
    previous = _previous(stream)
    following = np.full(len(stream), NEVER, dtype=np.int64)
    following[previous[previous >= 0]] = np.flatnonzero(previous >= 0)
    return following
