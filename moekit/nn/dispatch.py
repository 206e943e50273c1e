"""How rows get to the ranks that hold their experts, and back.

:class:`Local`, :class:`AllToAll` and :class:`Hierarchical` have one signature, so that the model knows no ranks:

    done = dispatch(experts, x, assignment, rows_expected)

Shape letters: N rows, K choices a row, D model dim, E experts in all, W ranks, M rows that a rank brings at most.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moekit.nn.experts import Assignment, Experts, expert_of
from moekit.nn.gate import sort_by_expert
from moekit.nn.parts import is_part, part

# Its name from torch 2.13 on, and before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def owned(experts: int, world_size: int, rank: int) -> range:
    """The experts that ``rank`` holds: contiguous, dealt as evenly as possible (sizes differ by one at most)."""
    return range(rank * experts // world_size, (rank + 1) * experts // world_size)


class Dispatch(Protocol):
    """How rows reach the experts that compute them.

    Attributes:
        by_expectation: whether it is fastest with ``rows_expected``, for any number of rows.
    """

    by_expectation: bool = False

    def check(self) -> None:
        """Raise an error if an exchange since the last check failed silently; it may wait for the device.

        A collective of torch that fails raises an error itself.
        """

    def __call__(
        self, experts: Experts, x: Tensor, assignment: Assignment, rows_expected: int | None = None
    ) -> Tensor:
        """Have the experts compute, wherever they are.

        Args:
            experts: those held here.
            x: [N, D].
            assignment: of the rows to all E experts, with weights.
            rows_expected: the most rows that any rank brings, the same number on every rank; None: unknown. With it, no
                number is read back from the device, as a CUDA graph requires.

        Returns:
            [N K, D], zero for the choices that are no expert's.
        """
        ...


class Local(Dispatch):
    """Every expert is here: nothing moves."""

    def __call__(
        self, experts: Experts, x: Tensor, assignment: Assignment, rows_expected: int | None = None
    ) -> Tensor:
        return experts(x, assignment)


class AllToAll(Dispatch):
    """Experts are spread over ranks as :func:`owned` deals them: those of the default process group, or ``ranks`` of it.

    Rows travel unpadded: only what the gate kept crosses the wire, in one exchange each way. Where the number of rows
    to expect is known, every rank gets all rows instead: that moves more, but no rank waits for the numbers of others,
    so it is better for few rows. A collective: every rank has to call it, with no rows if it has none, and with the
    same number of choices.

    Args:
        experts: of the whole model.
        ranks: consecutive ranks of the default process group that exchange rows with each other alone, and ``group``, theirs.
            Assignments are then of their experts only, counted from 0. None: all ranks.
    """

    def __init__(self, experts: int, ranks: range | None = None, group: dist.ProcessGroup | None = None):
        everyone, me = dist.get_world_size(), dist.get_rank()
        ranks = range(everyone) if ranks is None else ranks
        self.group, self.rank, self.world_size = group, ranks.index(me), len(ranks)
        held = [owned(experts, everyone, r) for r in ranks]
        self.deal = [len(own) for own in held]
        self.first = held[self.rank].start - held[0].start

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
            dist.all_to_all_single(arriving, counts, [mine] * self.world_size, self.deal, group=self.group)
        arriving = arriving.view(self.world_size, mine)
        # The numbers of rows are all that is read back from the device.
        leaving = torch.stack([part.sum() for part in counts.split(self.deal)])
        to_ranks, from_ranks = torch.stack([leaving, arriving.sum(dim=1)]).tolist()
        order = assignment.order[: sum(to_ranks)]
        received = exchange(x[order // choices], to_ranks, from_ranks, self.group)

        # The rows received are sorted by rank, then by expert.
        expert = torch.arange(mine, device=x.device, dtype=torch.int16).repeat(self.world_size)
        expert = expert.repeat_interleave(arriving.flatten(), output_size=len(received))
        done = experts(received, Assignment(*sort_by_expert(expert, mine)))

        home = exchange(done, from_ranks, to_ranks, self.group)
        out = x.new_zeros(len(x) * choices, x.shape[1])
        return out.index_copy(0, order, home * assignment.weights[order, None])

    def _to_all(self, experts: Experts, x: Tensor, assignment: Assignment, rows: int) -> Tensor:
        assert len(x) <= rows, f"a rank brings {len(x)} rows where at most {rows} are expected"
        choices = assignment.choices
        # Rows that are padding have no expert, either.
        chosen = F.pad(expert_of(assignment), (0, (rows - len(x)) * choices), value=len(assignment.counts))
        # [W M, D]
        everything = gather(F.pad(x, (0, 0, 0, rows - len(x))), self.world_size, self.group)
        # [W M K]
        chosen = gather(chosen, self.world_size, self.group) - self.first
        # [W M K, D]
        done = experts(everything, assigned(chosen, self.deal[self.rank], choices))

        home = torch.empty_like(done)
        with part("exchange"):
            dist.all_to_all_single(home, done, group=self.group)
        # Of what the ranks computed for one choice, all but one is zero.
        home = home.view(self.world_size, rows * choices, -1).sum(0)
        weights = assignment.weights
        return home[: len(weights)] * weights[:, None]


class Hierarchical(Dispatch):
    """Experts are spread over the ranks of several machines: only what has to cross from one machine to another does.

    A row goes once to each machine that holds one of its experts, however many of its choices are there, and comes back
    once: the weighted sum of those choices. It goes to the rank with the sender's place on that machine, and from there to
    the experts' ranks by an :class:`AllToAll` within the machine. With the choices of one row on m other machines,
    2 m D numbers cross, where :class:`AllToAll` sends 2 D for each choice. Where the number of rows to expect is known, each
    row goes to every other machine once, and not to each rank there.

    Two choices of a row are added as :func:`moekit.nn.operations.added` adds them, to the last digit; more than two may be
    added in another order.

    Args:
        experts: of the whole model.
        machines: the number of each rank's machine, from 0; those of one machine are next to each other.
    """

    def __init__(self, experts: int, machines: Sequence[int]):
        me, world_size = dist.get_rank(), dist.get_world_size()
        assert list(machines) == sorted(machines), (
            f"ranks of one machine are not next to each other: {machines}"
        )
        bounds = [machines.index(machine) for machine in range(machines[-1] + 1)] + [world_size]
        ranks = [range(start, end) for start, end in itertools.pairwise(bounds)]
        # Every rank makes all groups, as torch wants it.
        groups = [dist.new_group(list(of)) for of in ranks]
        self.machine, self.world_size = machines[me], world_size
        own = ranks[self.machine]
        self.within = AllToAll(experts, own, groups[self.machine])
        # The rank of each machine that takes rows from here.
        self.gateways = [of[(me - own.start) % len(of)] for of in ranks]
        # The experts of each machine: from one bound to the next.
        self.bounds = [owned(experts, world_size, of.start).start for of in ranks] + [experts]
        # Ranks with the same place on their machines; None where machines have different numbers of ranks.
        self.column, self.machines = None, len(ranks)
        if len({len(of) for of in ranks}) == 1:
            columns = [dist.new_group([of[place] for of in ranks]) for place in range(len(own))]
            self.column = columns[me - own.start]
        self.flat = AllToAll(experts)

    def __call__(
        self, experts: Experts, x: Tensor, assignment: Assignment, rows_expected: int | None = None
    ) -> Tensor:
        if rows_expected is None:
            return self._to_owners(experts, x, assignment)
        if self.column is None:
            return self.flat(experts, x, assignment, rows_expected)
        return self._to_all(experts, x, assignment, rows_expected)

    def _to_owners(self, experts: Experts, x: Tensor, assignment: Assignment) -> Tensor:
        choices, (rows, width) = assignment.choices, x.shape
        chosen = expert_of(assignment).view(rows, choices)
        bounds = torch.tensor(self.bounds, device=x.device)
        # [N, K], as many as machines for none
        machine = torch.searchsorted(bounds, chosen, right=True) - 1
        goes = torch.zeros(len(self.gateways) + 1, rows, dtype=torch.bool, device=x.device)
        goes.scatter_(0, machine.T, True)
        # P pairs of a machine and a row that goes there, sorted by machine.
        to, row = goes[:-1].nonzero(as_tuple=True)
        leaving = torch.bincount(to, minlength=len(self.gateways))
        to_ranks = leaving.new_zeros(self.world_size)
        to_ranks[self.gateways] = leaving
        from_ranks = torch.empty_like(to_ranks)
        with part("exchange"):
            dist.all_to_all_single(from_ranks, to_ranks)
        to_ranks, from_ranks = torch.stack([to_ranks, from_ranks]).tolist()

        # [P, K], the number of an expert on its machine; -1 for the choices that are none of it.
        here = torch.where(machine[row] == to[:, None], chosen[row] - bounds[to, None], -1)
        weights = assignment.weights.view(rows, choices)[row]
        received = exchange(x[row], to_ranks, from_ranks)
        here = exchange(here.int(), to_ranks, from_ranks)
        weights = exchange(weights, to_ranks, from_ranks)

        held = self.bounds[self.machine + 1] - self.bounds[self.machine]
        expert = here.flatten()
        order, counts = sort_by_expert(torch.where(expert < 0, held, expert), held)
        done = self.within(experts, received, Assignment(order, counts, choices, weights.flatten()))
        # [P, D]
        home = exchange(done.view(-1, choices, width).sum(dim=1), from_ranks, to_ranks)

        # What one machine made of a row stands in the place of the row's first choice there.
        first = (machine[row] == to[:, None]).int().argmax(dim=1)
        return x.new_zeros(rows * choices, width).index_copy(0, row * choices + first, home)

    def _to_all(self, experts: Experts, x: Tensor, assignment: Assignment, rows: int) -> Tensor:
        choices, missing = assignment.choices, rows - len(x)
        assert missing >= 0, f"a rank brings {len(x)} rows where at most {rows} are expected"
        total, within = len(assignment.counts), self.within
        chosen = F.pad(expert_of(assignment), (0, missing * choices), value=total)
        weights = F.pad(assignment.weights, (0, missing * choices))
        # First between machines, then within one: L ranks a machine, C machines.
        # [C M, D]
        column = gather(F.pad(x, (0, 0, 0, missing)), self.machines, self.column)
        # [L C M, D]
        everything = gather(column, within.world_size, within.group)
        chosen = gather(gather(chosen, self.machines, self.column), within.world_size, within.group)
        # [C M K]
        weights = gather(weights, self.machines, self.column)
        chosen = chosen - self.flat.first
        # [L C M K, D]
        done = experts(everything, assigned(chosen, within.deal[within.rank], choices))

        made = torch.empty_like(done)
        with part("exchange"):
            dist.all_to_all_single(made, done, group=within.group)
        # Of what the ranks of a machine computed for one choice, all but one is zero.
        made = made.view(within.world_size, len(weights), -1).sum(0) * weights[:, None]
        # [C M, D]
        made = made.view(self.machines * rows, choices, -1).sum(dim=1)
        home = torch.empty_like(made)
        with part("exchange"):
            dist.all_to_all_single(home, made, group=self.column)
        home = home.view(self.machines, rows, -1).sum(0)[: len(x)]
        return F.pad(home[:, None], (0, 0, 0, choices - 1)).flatten(0, 1)


def assigned(chosen: Tensor, held: int, choices: int) -> Assignment:
    """The assignment of choices to ``held`` experts, counted from 0; all other numbers are no expert's."""
    chosen = torch.where((chosen >= 0) & (chosen < held), chosen, held)
    return Assignment(*sort_by_expert(chosen, held), choices)


@is_part("exchange")
def gather(rows: Tensor, world_size: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """The rows of all ranks, rank after rank; every rank brings as many."""
    found = rows.new_empty(world_size * len(rows), *rows.shape[1:])
    all_gather(found, rows.contiguous(), group=group)
    return found


@is_part("exchange")
def exchange(
    rows: Tensor, to_ranks: list[int], from_ranks: list[int], group: dist.ProcessGroup | None = None
) -> Tensor:
    """Send ``to_ranks[r]`` consecutive rows to each rank r and receive ``from_ranks[r]``, in the order of ranks."""
    received = rows.new_empty(sum(from_ranks), rows.shape[1])
    dist.all_to_all_single(received, rows.contiguous(), from_ranks, to_ranks, group=group)
    return received
