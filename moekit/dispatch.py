"""How rows get to the ranks that hold their experts, and back.

``Local`` and ``AllToAll`` have one signature, so that the model knows no ranks, and it is that of the experts:

    done = dispatch(experts, x, order, counts, choices, weights)

Shape letters: N rows, K choices a row, P places (choices of rows, see experts.py), R rows on their way, D model dim,
E experts in all, W ranks, e experts held here.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moekit.experts import Experts


def owned(experts: int, world_size: int, rank: int) -> range:
    """The experts that ``rank`` holds: contiguous, dealt as evenly as possible (sizes differ by one at most)."""
    return range(rank * experts // world_size, (rank + 1) * experts // world_size)


class Dispatch(Protocol):
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

    def __call__(
        self, experts: Experts, x: Tensor, order: Tensor, counts: Tensor, choices: int, weights: Tensor
    ) -> Tensor:
        return experts(x, order, counts, choices, weights)


class AllToAll:
    """Experts are spread over the ranks of the default process group as :func:`owned` deals them.

    Rows travel unpadded: only what the gate kept crosses the wire, in one exchange each way. A collective: every
    rank has to call it, with no rows if it has none.
    """

    def __init__(self, experts: int):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.deal = [len(owned(experts, self.world_size, r)) for r in range(self.world_size)]

    def __call__(
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
        assert mine < torch.iinfo(torch.int16).max
        expert = torch.arange(mine, device=x.device, dtype=torch.int16).repeat(self.world_size)
        expert = expert.repeat_interleave(arriving.flatten(), output_size=len(received))
        done = experts(received, expert.argsort(stable=True), arriving.sum(dim=0))

        home = exchange(done, from_ranks, to_ranks)
        out = x.new_zeros(len(x) * choices, x.shape[1])
        return out.index_copy(0, order, home * weights[order, None])


def exchange(rows: Tensor, to_ranks: list[int], from_ranks: list[int]) -> Tensor:
    """Send ``to_ranks[r]`` consecutive rows to each rank r and receive ``from_ranks[r]``, in the order of ranks."""
    received = rows.new_empty(sum(from_ranks), rows.shape[1])
    dist.all_to_all_single(received, rows.contiguous(), from_ranks, to_ranks)
    return received
