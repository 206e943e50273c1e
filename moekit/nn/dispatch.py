"""How rows get to the ranks that hold their experts, and back.

:class:`Local` and :class:`AllToAll` have one signature, so that the model knows no ranks:

    done = dispatch(experts, x, assignment, rows_expected)

Shape letters: N rows, K choices a row, D model dim, E experts in all, W ranks, M rows that a rank brings at most.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moekit.nn.experts import Assignment, Experts
from moekit.nn.gate import sort_by_expert
from moekit.nn.parts import is_part, part

# Its name from torch 2.13 on, and before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def owned(experts: int, world_size: int, rank: int) -> range:
    """The experts that ``rank`` holds: contiguous, dealt as evenly as possible (sizes differ by one at most)."""
    return range(rank * experts // world_size, (rank + 1) * experts // world_size)


class Dispatch(Protocol):
    """``by_expectation``: whether it does best with ``rows_expected``, however many they are."""

    by_expectation: bool

    def check(self) -> None:
        """Raise if an exchange since the last check went wrong without a word; may ask the device."""
        ...

    def __call__(
        self, experts: Experts, x: Tensor, assignment: Assignment, rows_expected: int | None = None
    ) -> Tensor:
        """Have the experts compute, wherever they are.

        Args:
            experts: those held here.
            x: [N, D].
            assignment: of the rows to all E experts, with weights.
            rows_expected: N of no rank is greater, and every rank says the same number; None: unknown. Given it,
                nothing here asks the device for a number, as a CUDA graph must not.

        Returns:
            [N K, D], zero for the choices that are no expert's.
        """
        ...


class Local:
    """Every expert is here: nothing moves."""

    by_expectation = False

    def check(self) -> None:
        """Nothing moves, so nothing can go wrong."""

    def __call__(
        self, experts: Experts, x: Tensor, assignment: Assignment, rows_expected: int | None = None
    ) -> Tensor:
        return experts(x, assignment)


class AllToAll:
    """Experts are spread over the ranks of the default process group as :func:`owned` deals them.

    Rows travel unpadded: only what the gate kept crosses the wire, in one exchange each way. Where the number of rows
    to expect is known, every rank gets all rows instead: that moves more, but no rank waits for the numbers of others,
    so it is better for few rows. A collective: every rank has to call it, with no rows if it has none, and with the
    same number of choices.
    """

    by_expectation = False

    def __init__(self, experts: int):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.deal = [len(owned(experts, self.world_size, r)) for r in range(self.world_size)]
        self.first = owned(experts, self.world_size, self.rank).start

    def check(self) -> None:
        """A collective that fails raises by itself."""

    def __call__(
        self, experts: Experts, x: Tensor, assignment: Assignment, rows_expected: int | None = None
    ) -> Tensor:
        if rows_expected is None:
            return self._to_owners(experts, x, assignment)
        return self._to_all(experts, x, assignment, rows_expected)

    def _to_owners(self, experts: Experts, x: Tensor, assignment: Assignment) -> Tensor:
        counts, choices = assignment.counts, assignment.choices
        mine = self.deal[self.rank]
        # How many choices of each rank are of each expert held here.
        arriving = counts.new_empty(self.world_size * mine)
        with part("exchange"):
            dist.all_to_all_single(arriving, counts, [mine] * self.world_size, self.deal)
        arriving = arriving.view(self.world_size, mine)
        # How many rows go where is the one question to the device.
        leaving = torch.stack([part.sum() for part in counts.split(self.deal)])
        to_ranks, from_ranks = torch.stack([leaving, arriving.sum(dim=1)]).tolist()
        order = assignment.order[: sum(to_ranks)]
        received = exchange(x[order // choices], to_ranks, from_ranks)

        # The rows received are sorted by rank, then by expert.
        expert = torch.arange(mine, device=x.device, dtype=torch.int16).repeat(self.world_size)
        expert = expert.repeat_interleave(arriving.flatten(), output_size=len(received))
        done = experts(received, Assignment(*sort_by_expert(expert, mine)))

        home = exchange(done, from_ranks, to_ranks)
        out = x.new_zeros(len(x) * choices, x.shape[1])
        return out.index_copy(0, order, home * assignment.weights[order, None])

    def _to_all(self, experts: Experts, x: Tensor, assignment: Assignment, rows: int) -> Tensor:
        assert len(x) <= rows, f"a rank brings {len(x)} rows where at most {rows} are expected"
        order, counts, choices = assignment.order, assignment.counts, assignment.choices
        # The expert of each choice; E for those that are no expert's and for those of the rows that are padding.
        expert = torch.searchsorted(counts.cumsum(0), torch.arange(len(order), device=x.device), right=True)
        chosen = counts.new_full((rows * choices,), len(counts)).scatter(0, order, expert)
        everything = gather(F.pad(x, (0, 0, 0, rows - len(x))), self.world_size)  # [W M, D]
        chosen = gather(chosen, self.world_size) - self.first  # [W M K]
        mine = self.deal[self.rank]
        chosen = torch.where((chosen >= 0) & (chosen < mine), chosen, mine)
        done = experts(everything, Assignment(*sort_by_expert(chosen, mine), choices))  # [W M K, D]

        home = torch.empty_like(done)
        with part("exchange"):
            dist.all_to_all_single(home, done)
        # Of what the ranks computed for one choice, all but one is zero.
        home = home.view(self.world_size, rows * choices, -1).sum(0)
        weights = assignment.weights
        return home[: len(weights)] * weights[:, None]


@is_part("exchange")
def gather(rows: Tensor, world_size: int) -> Tensor:
    """What each rank has, one after the other, all of one shape."""
    found = rows.new_empty(world_size * len(rows), *rows.shape[1:])
    all_gather(found, rows.contiguous())
    return found


@is_part("exchange")
def exchange(rows: Tensor, to_ranks: list[int], from_ranks: list[int]) -> Tensor:
    """Send ``to_ranks[r]`` consecutive rows to each rank r and receive ``from_ranks[r]``, in the order of ranks."""
    received = rows.new_empty(sum(from_ranks), rows.shape[1])
    dist.all_to_all_single(received, rows.contiguous(), from_ranks, to_ranks)
    return received
