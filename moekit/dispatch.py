"""How rows get to the ranks that hold their experts, and back.

``Local`` and ``AllToAll`` have one signature, so that the model knows no ranks:

    rows, counts, ticket = dispatch.send(rows, counts)    # to the experts
    rows = dispatch.back(rows, ticket)                    # and home again, in the order of departure

Shape letters: R rows sorted by expert, D model dim, E experts in all, W ranks, e experts held here.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


def owned(experts: int, world_size: int, rank: int) -> range:
    """The experts that ``rank`` holds: contiguous, dealt as evenly as possible (sizes differ by one at most)."""
    return range(rank * experts // world_size, (rank + 1) * experts // world_size)


class Dispatch(Protocol):
    def send(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Send rows to their experts.

        Args:
            rows: [R, D], sorted by expert.
            counts: [E] int64, rows for each expert.

        Returns:
            rows [r, D] for the experts held here, sorted by expert; their counts [e]; and a ticket for :meth:`back`.
        """
        ...

    def back(self, rows: Tensor, ticket: Any) -> Tensor:
        """Return rows [r, D] to where they came from: [R, D] in the order of departure."""
        ...


class Local:
    """Every expert is here: nothing moves."""

    def send(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, None]:
        return rows, counts, None

    def back(self, rows: Tensor, ticket: None) -> Tensor:
        return rows


class AllToAll:
    """Experts are spread over the ranks of the default process group as :func:`owned` deals them.

    Rows travel unpadded: only what the gate kept crosses the wire, in one exchange each way.
    """

    def __init__(self, experts: int):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.deal = [len(owned(experts, self.world_size, r)) for r in range(self.world_size)]

    def send(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Any]:
        mine = self.deal[self.rank]
        arriving = counts.new_empty(
            self.world_size * mine
        )  # [W * e]: what each rank has for each expert held here
        dist.all_to_all_single(arriving, counts, [mine] * self.world_size, self.deal)
        to_ranks = [int(part.sum()) for part in counts.cpu().split(self.deal)]
        arriving = arriving.view(self.world_size, mine)
        from_ranks = arriving.sum(dim=1).tolist()
        received = exchange(rows, to_ranks, from_ranks)

        # They arrive sorted by rank, then expert; the experts want them by expert.
        expert = torch.arange(mine, device=rows.device).repeat(self.world_size)
        expert = expert.repeat_interleave(arriving.flatten())
        order = expert.argsort(stable=True)
        return received[order], arriving.sum(dim=0), (order, to_ranks, from_ranks)

    def back(self, rows: Tensor, ticket: Any) -> Tensor:
        order, to_ranks, from_ranks = ticket
        return exchange(torch.empty_like(rows).index_copy_(0, order, rows), from_ranks, to_ranks)


def exchange(rows: Tensor, to_ranks: list[int], from_ranks: list[int]) -> Tensor:
    """Send ``to_ranks[r]`` consecutive rows to each rank r and receive ``from_ranks[r]``, in the order of ranks."""
    received = rows.new_empty(sum(from_ranks), rows.shape[1])
    dist.all_to_all_single(received, rows.contiguous(), from_ranks, to_ranks)
    return received
