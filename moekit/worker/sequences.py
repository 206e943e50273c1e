"""The sequences that a rank keeps while they are generated, and what a finished generation leaves for the next one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moekit.nn import graphs
from moekit.nn.cache import Cache
from moekit.nn.dispatch import Local
from moekit.ranks import Rank
from moekit.worker.greedy import Greedy
from moekit.worker.sampling import Settings

# Key of the rank's state for the :class:`Spare` of the last finished generation.
SPARE = "spare step"


class Sequences:
    """The sequences of this rank, row by row: their cache, and the state that the choice of the next token needs.

    ``on_ranks`` counts the sequences of every rank, since joint decisions must depend on values that all ranks have.
    """

    def __init__(
        self,
        settings: Settings,
        numbers: list[int],
        on_ranks: list[int],
        cache: Cache,
        seen: Tensor | None,
        alike: Hashable,
        spare: Spare,
    ):
        self.settings, self.numbers, self.on_ranks = settings, numbers, on_ranks
        self.cache, self.seen = cache, seen
        # Tokens that each sequence has read after its prompt; the number is the same for all sequences.
        self.steps = 0
        # The parts of a trace.
        self.parts: list[dict[str, np.ndarray]] = []
        # The graph of a step with the current rows, and the steps since the rows of any rank changed.
        self.graph, self.prefill = spare.graph, spare.prefill
        if isinstance(self.graph, Greedy) != settings.greedy:
            # The one chooses the next token, the other one does not.
            self.graph = None
        self.unchanged = 0
        self.alike: Hashable = alike

    def select(self, rows: Sequence[list[int]], rank: int) -> None:
        """Keep the rows ``rows`` of each rank, in this order; a row may repeat."""
        same = [kept == list(range(count)) for kept, count in zip(rows, self.on_ranks, strict=True)]
        if all(same):
            return
        self.on_ranks = [len(kept) for kept in rows]
        self.graph = self.prefill = self.alike = None
        self.unchanged = 0
        if same[rank]:
            return
        index = torch.tensor(rows[rank], device=self.cache.lengths.device, dtype=torch.long)
        self.cache.select(index)
        self.seen = None if self.seen is None else self.seen[index]
        self.numbers = [self.numbers[row] for row in rows[rank]]


class Spare(NamedTuple):
    """What a finished generation leaves for one with an equal ``alike``, which all ranks share.

    ``prefill`` runs the pass over the prompts on ``cache``, with a graph after enough of one shape. ``graph`` is of a decode
    step on it. Both are None where nothing is left.
    """

    alike: Hashable
    prefill: graphs.Repeated
    cache: Cache | None = None
    graph: graphs.Graph | graphs.InParts | Greedy | None = None


def take_spare(rank: Rank, alike: Hashable) -> Spare:
    """The spare if its ``alike`` is equal; otherwise it is dropped, and the result is empty. Its cache holds old tokens."""
    spare: Spare | None = rank.state.pop(SPARE, None)
    if spare is None or spare.alike != alike:
        return Spare(alike, graphs.Repeated(rank.device, isinstance(rank.state["model"].dispatch, Local)))
    return spare
