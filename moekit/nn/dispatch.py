"""How rows get to the ranks that hold their experts, and back.

``Local`` and ``AllToAll`` have one signature, so that the model knows no ranks, and it is that of the experts:

    done = dispatch(experts, x, order, counts, choices, weights)

Shape letters: N rows, K choices a row, P places (choices of rows, see experts.py), R rows on their way, D model dim,
E experts in all, W ranks, e experts held here, M rows that a rank has at most.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moekit.nn.experts import Experts
from moekit.nn.gate import sort_by_expert

# Its name from torch 2.13 on, and before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def owned(experts: int, world_size: int, rank: int) -> range:
    """The experts that ``rank`` holds: contiguous, dealt as evenly as possible (sizes differ by one at most)."""
    return range(rank * experts // world_size, (rank + 1) * experts // world_size)


class Dispatch(Protocol):
    def expecting(self, rows: int | None) -> contextlib.AbstractContextManager[None]:
        """While it is entered, no rank brings more than ``rows`` rows to a call; every rank has to say the same.

        Then nothing asks the device for a number, as a CUDA graph must not. None: nobody knows.
        """
        ...

    def __call__(
        self, experts: Experts, x: Tensor, order: Tensor, counts: Tensor, choices: int, weights: Tensor
    ) -> Tensor:
        """Have the experts work, wherever they are.

        Args:
            experts: those held here.
            x: [N, D].
            order: [P] int64, places sorted by expert; those behind the first ``counts.sum()`` are no expert's.
            counts: [E] int64, places of each expert.
            choices: K.
            weights: [N K].

        Returns:
            [N K, D], zero at the places that are no expert's.
        """
        ...


class Local:
    """Every expert is here: nothing moves."""

    def expecting(self, rows: int | None) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def __call__(
        self, experts: Experts, x: Tensor, order: Tensor, counts: Tensor, choices: int, weights: Tensor
    ) -> Tensor:
        return experts(x, order, counts, choices, weights)


class AllToAll:
    """Experts are spread over the ranks of the default process group as :func:`owned` deals them.

    Rows travel unpadded: only what the gate kept crosses the wire, in one exchange each way. Where it is known how many
    rows to expect, everybody gets all of them instead, which moves more but asks nobody: better for few. A collective:
    every rank has to call it, with no rows if it has none, and the same number of choices.
    """

    def __init__(self, experts: int):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.deal = [len(owned(experts, self.world_size, r)) for r in range(self.world_size)]
        self.first = owned(experts, self.world_size, self.rank).start
        self.most: int | None = None

    @contextlib.contextmanager
    def expecting(self, rows: int | None) -> Iterator[None]:
        self.most = rows
        try:
            yield
        finally:
            self.most = None

    def __call__(
        self, experts: Experts, x: Tensor, order: Tensor, counts: Tensor, choices: int, weights: Tensor
    ) -> Tensor:
        go = self._to_owners if self.most is None else self._to_everybody
        return go(experts, x, order, counts, choices, weights)

    def _to_owners(
        self, experts: Experts, x: Tensor, order: Tensor, counts: Tensor, choices: int, weights: Tensor
    ) -> Tensor:
        mine = self.deal[self.rank]
        arriving = counts.new_empty(self.world_size * mine)  # what each rank has for each expert held here
        dist.all_to_all_single(arriving, counts, [mine] * self.world_size, self.deal)
        arriving = arriving.view(self.world_size, mine)
        # The one question to the device: how many rows go where.
        leaving = torch.stack([part.sum() for part in counts.split(self.deal)])
        to_ranks, from_ranks = torch.stack([leaving, arriving.sum(dim=1)]).tolist()
        order = order[: sum(to_ranks)]
        received = exchange(x[order // choices], to_ranks, from_ranks)

        # They arrive sorted by rank, then expert.
        expert = torch.arange(mine, device=x.device, dtype=torch.int16).repeat(self.world_size)
        expert = expert.repeat_interleave(arriving.flatten(), output_size=len(received))
        done = experts(received, *sort_by_expert(expert, mine))

        home = exchange(done, from_ranks, to_ranks)
        out = x.new_zeros(len(x) * choices, x.shape[1])
        return out.index_copy(0, order, home * weights[order, None])

    def _to_everybody(
        self, experts: Experts, x: Tensor, order: Tensor, counts: Tensor, choices: int, weights: Tensor
    ) -> Tensor:
        most = self.most
        assert most is not None and len(x) <= most
        # The expert of each place, E behind the last expert's, and of the places of rows that are not there.
        expert = torch.searchsorted(counts.cumsum(0), torch.arange(len(order), device=x.device), right=True)
        chosen = counts.new_full((most * choices,), len(counts)).scatter(0, order, expert)
        rows = gather(F.pad(x, (0, 0, 0, most - len(x))), self.world_size)  # [W M, D]
        chosen = gather(chosen, self.world_size) - self.first  # [W M K]
        mine = self.deal[self.rank]
        chosen = torch.where((chosen >= 0) & (chosen < mine), chosen, mine)
        done = experts(rows, *sort_by_expert(chosen, mine), choices)  # [W M K, D]

        home = torch.empty_like(done)
        dist.all_to_all_single(home, done)
        home = home.view(self.world_size, most * choices, -1).sum(0)  # all but one of them are zero
        return home[: len(weights)] * weights[:, None]


def gather(rows: Tensor, world_size: int) -> Tensor:
    """What each rank has, one after the other, all of one shape."""
    found = rows.new_empty(world_size * len(rows), *rows.shape[1:])
    all_gather(found, rows.contiguous())
    return found


def exchange(rows: Tensor, to_ranks: list[int], from_ranks: list[int]) -> Tensor:
    """Send ``to_ranks[r]`` consecutive rows to each rank r and receive ``from_ranks[r]``, in the order of ranks."""
    received = rows.new_empty(sum(from_ranks), rows.shape[1])
    dist.all_to_all_single(received, rows.contiguous(), from_ranks, to_ranks)
    return received
