"""Which experts of a layer stay in its slots, when there are fewer slots than experts.

Requests are numbers of experts, in the order of the text: a token's first choice before its second. At each request the
expert is in a slot (a hit) or has to be fetched. These are the rules of :func:`moekit.routing.metrics.cache_hits`,
which simulates what runs here.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


class Policy(ABC):
    """The experts that one layer keeps, at most ``slots`` of them.

    Attributes:
        kept: the numbers of the experts in slots.
    """

    kept: set[int] | OrderedDict[int, None]

    def __init__(self, experts: int, slots: int):
        self.experts, self.slots = experts, slots
        self.clear()

    @abstractmethod
    def clear(self) -> None:
        """Begin again, with what is kept at the start."""

    @abstractmethod
    def take(self, requests: Sequence[int]) -> int:
        """Take requests one after the other; returns how many of them hit."""

    @abstractmethod
    def after(self, requests: np.ndarray) -> set[int]:
        """What will be kept once :meth:`take` has taken ``requests``, without taking them.

        For many requests it is much faster than :meth:`take`, which goes through them one by one. So the copies of a large
        pass begin before its hits are counted.
        """


class Lru(Policy):
    """It keeps the experts requested last."""

    def clear(self) -> None:
        # The one requested longest ago comes first.
        self.kept: OrderedDict[int, None] = OrderedDict()

    def take(self, requests: Sequence[int]) -> int:
        kept, hits = self.kept, 0
        for expert in requests:
            if expert in kept:
                hits += 1
                kept.move_to_end(expert)
            else:
                if len(kept) == self.slots:
                    kept.popitem(last=False)
                kept[expert] = None
        return hits

    def after(self, requests: np.ndarray) -> set[int]:
        found, first = np.unique(requests[::-1], return_index=True)
        latest = found[np.argsort(first)].tolist()
        return set(list(dict.fromkeys([*latest, *reversed(self.kept)]))[: self.slots])


class Lfu(Policy):
    """It keeps the experts requested most often so far, and of equals those requested last; counts are never reset."""

    def clear(self) -> None:
        self.kept: set[int] = set()
        self.time = 0
        # Of each expert: requests so far, and the time of the last one.
        self.rank = [(0, -1)] * self.experts
        # The kept experts with a rank that each has or had.
        self.lowest: list[tuple[tuple[int, int], int]] = []

    def take(self, requests: Sequence[int]) -> int:
        hits, kept, rank, lowest = 0, self.kept, self.rank, self.lowest
        for expert in requests:
            rank[expert] = mine = (rank[expert][0] + 1, self.time)
            self.time += 1
            if expert in kept:
                hits += 1
            elif len(kept) < self.slots:
                kept.add(expert)
                heapq.heappush(lowest, (mine, expert))
            else:
                while lowest[0][0] != (now := rank[lowest[0][1]]):
                    heapq.heapreplace(lowest, (now, lowest[0][1]))
                if lowest[0][0] < mine:
                    _, evicted = heapq.heapreplace(lowest, (mine, expert))
                    kept.remove(evicted)
                    kept.add(expert)
        return hits

    def after(self, requests: np.ndarray) -> set[int]:
        count, last = np.array(self.rank).T.copy()
        count += np.bincount(requests, minlength=self.experts)
        # Of several requests of an expert the last one counts, as NumPy assigns in order.
        last[requests] = self.time + np.arange(len(requests))
        best = np.lexsort((last, count))[::-1][: self.slots]
        return set(best[count[best] > 0].tolist())


class Hottest(Policy):
    """It always keeps the same experts: those with the highest ``heat`` [E], such as the number of their choices in a trace."""

    def __init__(self, experts: int, slots: int, heat: np.ndarray):
        self.heat = np.asarray(heat)
        super().__init__(experts, slots)

    def clear(self) -> None:
        self.kept: set[int] = set(np.argsort(-self.heat, kind="stable")[: self.slots].tolist())

    def take(self, requests: Sequence[int]) -> int:
        kept = self.kept
        return sum(expert in kept for expert in requests)

    def after(self, requests: np.ndarray) -> set[int]:
        return set(self.kept)


POLICIES = {"lru": Lru, "lfu": Lfu}
# The one where none is named.
USUAL = "lru"
