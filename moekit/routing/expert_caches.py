"""Caches of experts for those who keep the others elsewhere: which requests hit, for every size of cache at once.

A stream is [n] expert numbers in the order of their requests. LRU, LFU and Belady's oracle are all stack algorithms: what
a cache holds is part of what a larger one holds (Mattson et al. 1970), so that one pass tells the hits of all sizes.
"""

from __future__ import annotations

import itertools

import numpy as np

NEVER = np.iinfo(np.int32).max
PIECE = 24_000  # requests that the oracle takes one after the other


def hits(rank: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """How many requests hit in a cache of each size, those with a rank below it."""
    return np.searchsorted(np.sort(rank), sizes)


def lru_distance(stream: np.ndarray) -> np.ndarray:
    """[n]: how many other experts were requested since this one was last; ``NEVER`` at its first request.

    Between the last request p and this one, t, there were t - p - 1 others, less the repeats among them: requests s < t
    whose own last request lies after p.
    """
    previous, _ = _previous(stream)
    distance = np.arange(len(stream)) - previous - 1 - _earlier_greater(previous)
    return np.where(previous < 0, NEVER, distance)


def lfu_rank(stream: np.ndarray) -> np.ndarray:
    """[n]: how many experts come before this one by (requests so far, last request); ``NEVER`` at its first request.

    With c requests before t, the last at p: experts with more are those whose request number c (from 0) came before t,
    as many as t has predecessors among all requests number c. Experts with as many and a later last one made their
    request number c - 1 between p and t, and the next not before t.
    """
    n = len(stream)
    previous, number = _previous(stream)
    order = np.argsort(number, kind="stable")  # by number, then time
    key = number[order] * n + order
    place = np.empty(n, dtype=np.int64)
    place[order] = np.arange(n)
    starts = np.searchsorted(key, np.arange(number.max(initial=-1) + 1) * n)
    more = place - starts[number]
    between = np.searchsorted(key, (number - 1) * n + np.arange(n)) - place[previous] - 1
    gone = np.empty(n, dtype=np.int64)  # of those between, the ones that were requested again before t
    gone[order] = _earlier_greater(np.where(previous < 0, -1, place[previous])[order])
    return np.where(previous < 0, NEVER, more + between - gone)


def oracle_hits(streams: list[np.ndarray], experts: int, sizes: np.ndarray) -> np.ndarray:
    """Belady's hits (1966): of what a full cache holds and what is requested, whoever is needed again last is not kept.
    No other policy has more.

    Streams of more than ``PIECE`` requests run in pieces, all at once, each after a run-up of 8 E requests that are not
    counted. A piece does not know what was requested only before its run-up, which matters to sizes near E alone.

    Args:
        sizes: [C], ascending.

    Returns:
        [streams, C] int64.

    A stack of next uses holds every size's cache in its upper part: the expert requested comes in on top, and from there
    down to where it was, at each place the one that is needed later moves on.
    """
    pieces = []  # (stream, first request, first that counts, end)
    for number, stream in enumerate(streams):
        cuts = np.linspace(0, len(stream), -(-len(stream) // PIECE) + 1).astype(int)
        pieces += [(number, max(0, a - 8 * experts), a, b) for a, b in itertools.pairwise(cuts)]
    steps, depth = max((end - first for _, first, _, end in pieces), default=0), int(sizes[-1])
    dtype = np.int16 if steps < np.iinfo(np.int16).max else np.int32
    never = np.iinfo(dtype).max
    after = np.full(
        (steps, len(pieces)), never, dtype=dtype
    )  # next uses, counted from the piece's first request
    counted = np.zeros((steps, len(pieces)), dtype=bool)
    following = [_following(stream) for stream in streams]
    for lane, (number, first, start, end) in enumerate(pieces):
        after[: end - first, lane] = np.minimum(following[number][first:end] - first, never)
        counted[start - first : end - first, lane] = True

    stack = np.full((depth, len(pieces)), never, dtype=dtype)
    moving, spare = np.empty((2, depth + 1, len(pieces)), dtype=dtype)
    found = np.empty(stack.shape, dtype=bool)
    parts = list(itertools.pairwise([0, *sizes.tolist()]))  # of the stack: what a larger cache has besides
    hit = np.zeros((len(parts), len(pieces)), dtype=np.int64)
    for step in range(steps):
        np.equal(stack, step, out=found)  # next use is now: it is the one requested
        for part, (top, bottom) in enumerate(parts):
            hit[part] += found[top:bottom].any(axis=0) & counted[step]
        np.copyto(stack, never, where=found)  # it leaves its place to who moves on
        moving[0], moving[1:] = after[step], stack
        moving, spare = _running_maximum(moving, spare)
        np.minimum(moving[:-1], stack, out=stack)
    total = np.zeros((len(streams), len(parts)), dtype=np.int64)
    np.add.at(total, [number for number, *_ in pieces], hit.T)
    return total.cumsum(axis=1)


def _running_maximum(values: np.ndarray, spare: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``np.maximum.accumulate`` along axis 0 in log2 steps, several times faster; uses up both arrays, and returns both."""
    shift = 1
    while shift < len(values):
        spare[:shift] = values[:shift]
        np.maximum(values[shift:], values[:-shift], out=spare[shift:])
        values, spare = spare, values
        shift *= 2
    return values, spare


def _previous(stream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each request the one before it of the same expert (-1: none), and how many there were before."""
    n = len(stream)
    order = np.argsort(stream, kind="stable")
    first = np.ones(n, dtype=bool)
    first[1:] = stream[order[1:]] != stream[order[:-1]]
    previous, number = np.empty((2, n), dtype=np.int64)
    previous[order] = np.where(first, -1, np.roll(order, 1))
    number[order] = np.arange(n) - np.maximum.accumulate(np.where(first, np.arange(n), 0))
    return previous, number


def _following(stream: np.ndarray) -> np.ndarray:
    """For each request the next one of the same expert; ``NEVER`` if there is none."""
    previous, _ = _previous(stream)
    following = np.full(len(stream), NEVER, dtype=np.int64)
    following[previous[previous >= 0]] = np.flatnonzero(previous >= 0)
    return following


def _earlier_greater(values: np.ndarray) -> np.ndarray:
    """[n]: how many elements before each one are greater. Values are different numbers below n, or -1, which is least.

    Bit by bit from the highest: among elements whose higher bits agree, an earlier one is greater by this bit if it has
    it and the other has not. Ranks being a permutation, those with common higher bits fill a stretch of their own, half
    of it with the bit. Within stretches of 128 each is compared with each.
    """
    n, low = len(values), 7
    bits = max(low, (n - 1).bit_length())
    real = values >= 0
    least = n - int(real.sum())
    there = np.zeros(n, dtype=np.int64)
    there[values[real]] = 1
    packed = np.arange(
        1 << bits
    )  # the rank, and above 32 bits what was counted; beyond n come greater ones, too late
    packed[:n][~real] = np.arange(least)
    packed[:n][real] = (np.cumsum(there) + least - 1)[values[real]]
    rank, index = packed[:n].copy(), np.arange(1 << bits, dtype=np.int32)
    for bit in reversed(range(low, bits)):
        one = (packed & (1 << bit)) != 0
        before = np.cumsum(one, dtype=np.int32) - (
            index >> (bit + 1) << bit
        )  # ones before, within the stretch
        zero = ~one
        halves = packed[zero] + (before[zero].astype(np.int64) << 32), packed[one]
        stretches = packed.reshape(-1, 2, 1 << bit)
        for side, half in enumerate(halves):
            stretches[:, side] = half.reshape(-1, 1 << bit)
    local = np.ascontiguousarray((packed & ((1 << low) - 1)).reshape(-1, 1 << low).T.astype(np.int8))
    greater = np.zeros_like(local)
    for place in range(1, len(local)):
        greater[place] = (local[:place] > local[place]).sum(axis=0, dtype=np.int8)
    found = np.empty_like(packed)
    found[packed & 0xFFFFFFFF] = (packed >> 32) + greater.T.ravel()
    return found[rank]
