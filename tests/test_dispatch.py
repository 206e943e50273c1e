"""The hierarchical exchange against the flat one: the same sums, and between machines only what has to cross."""

import sys

import cloudpickle
import pytest
import torch
import torch.distributed as dist

from moekit import ranks
from moekit.nn import dispatch
from moekit.nn.dispatch import AllToAll, Hierarchical, owned
from moekit.nn.experts import Assignment

cloudpickle.register_pickle_by_value(sys.modules[__name__])

ROWS, WIDTH = 40, 8


@pytest.fixture(scope="module")
def four():
    with ranks.start(4, "cpu") as pool:
        yield pool


class Stamp:
    """Experts whose output is the row plus the expert's number."""

    def __init__(self, first):
        self.first = first

    def __call__(self, x, assignment):
        order, counts, choices = assignment.order, assignment.counts, assignment.choices
        number = torch.arange(self.first, self.first + len(counts)).repeat_interleave(counts)
        order = order[: len(number)]
        out = x.new_zeros(len(x) * choices, x.shape[1])
        out.index_copy_(0, order, x[order // choices] + number[:, None])
        return out if assignment.weights is None else out * assignment.weights[:, None]


def drawn(rank, experts, choices, rows):
    """x [N, D], the expert of each choice [N K] (``experts`` is none), and the assignment."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.rand(rows, WIDTH, generator=generator)
    expert = torch.randint(0, experts + 1, (choices * rows,), generator=generator)
    weights = torch.rand(choices * rows, generator=generator)
    counts = torch.bincount(expert, minlength=experts + 1)[:experts]
    return x, expert, Assignment(expert.argsort(stable=True), counts, choices, weights)


def both(rank, machines, experts, choices, expected):
    """What the two make of the same rows, summed over each row's choices. Rank 1 has no row at all."""
    x, expert, assignment = drawn(rank.rank, experts, choices, 0 if rank.rank == 1 else ROWS)
    stamp = Stamp(owned(experts, rank.world_size, rank.rank).start)
    found = [
        way(stamp, x, assignment, expected).view(len(x), choices, WIDTH).sum(dim=1)
        for way in (AllToAll(experts), Hierarchical(experts, machines))
    ]
    wanted = (x.repeat_interleave(choices, dim=0) + expert[:, None]) * assignment.weights[:, None]
    wanted = (wanted * (expert < experts)[:, None]).view(len(x), choices, WIDTH).sum(dim=1)
    return *found, wanted


@pytest.mark.parametrize("expected", [None, ROWS, ROWS + 3])
@pytest.mark.parametrize("experts, choices", [(13, 2), (2, 2), (8, 1)])
@pytest.mark.parametrize("machines", [(0, 0, 1, 1), (0, 1, 1, 1), (0, 1, 2, 3), (0, 0, 0, 1), (0, 0, 1, 2)])
def test_the_sums_are_those_of_the_flat_exchange_to_the_last_digit(
    four, machines, experts, choices, expected
):
    for flat, hierarchical, wanted in four.call(both, machines, experts, choices, expected):
        assert torch.equal(flat, wanted) and torch.equal(hierarchical, wanted)


def test_more_than_two_choices_are_the_same_but_for_rounding(four):
    for flat, hierarchical, _ in four.call(both, (0, 0, 1, 1), 13, 4, None):
        torch.testing.assert_close(hierarchical, flat)


class Counted:
    """The numbers of rows' width that this rank sends to other machines, counted where torch is called."""

    def __init__(self, machines, monkey):
        self.machines, self.rows = machines, 0
        self.all_to_all, self.all_gather = dist.all_to_all_single, dispatch.all_gather
        monkey.setattr(dispatch.dist, "all_to_all_single", self._all_to_all)
        monkey.setattr(dispatch, "all_gather", self._all_gather)

    def _others(self, group):
        everyone = dist.get_process_group_ranks(group or dist.group.WORLD)
        here = self.machines[dist.get_rank()]
        return [place for place, other in enumerate(everyone) if self.machines[other] != here], len(everyone)

    def _all_to_all(self, out, sent, out_splits=None, splits=None, group=None):
        others, size = self._others(group)
        splits = splits or [len(sent) // size] * size
        if sent.dim() == 2 and sent.shape[1] == WIDTH:
            self.rows += sum(splits[place] for place in others)
        self.all_to_all(out, sent, out_splits, splits, group=group)

    def _all_gather(self, out, sent, group=None):
        if sent.dim() == 2 and sent.shape[1] == WIDTH:
            self.rows += len(sent) * len(self._others(group)[0])
        self.all_gather(out, sent, group=group)


def crossing(rank, way, machines, experts, expected):
    """Rows that ``way`` sends from this rank to other machines, and what it has to: pairs of a row and a machine."""
    x, expert, assignment = drawn(rank.rank, experts, 2, ROWS)
    ways = {"flat": AllToAll, "hierarchical": lambda experts: Hierarchical(experts, machines)}
    done = ways[way](experts)
    with pytest.MonkeyPatch.context() as monkey:
        counted = Counted(machines, monkey)
        done(Stamp(owned(experts, rank.world_size, rank.rank).start), x, assignment, expected)
    holder = torch.tensor([r for r in range(4) for _ in owned(experts, 4, r)] + [rank.rank])
    there = torch.tensor(machines)[holder][expert].view(ROWS, 2)
    away = there != machines[rank.rank]
    pairs = sum(len(set(row[other].tolist())) for row, other in zip(there, away, strict=True))
    return counted.rows, pairs, int(away.sum())


@pytest.mark.parametrize("machines", [(0, 0, 1, 1), (0, 1, 2, 2)])
def test_a_row_crosses_once_to_each_machine_and_comes_back_once(four, machines):
    flat = four.call(crossing, "flat", machines, 16, None)
    found = four.call(crossing, "hierarchical", machines, 16, None)
    # What goes out of all ranks is what has to, there and back.
    assert sum(rows for rows, _, _ in found) == 2 * sum(pairs for _, pairs, _ in found)
    assert sum(rows for rows, _, _ in flat) == 2 * sum(choices for _, _, choices in flat)
    assert sum(rows for rows, _, _ in found) < sum(rows for rows, _, _ in flat)


def test_where_the_number_is_known_a_row_goes_to_each_machine_and_not_to_each_rank(four):
    flat = four.call(crossing, "flat", (0, 0, 1, 1), 16, ROWS)
    found = four.call(crossing, "hierarchical", (0, 0, 1, 1), 16, ROWS)
    # There and back to the one other machine, against two ranks there and two choices back from each.
    assert [rows for rows, _, _ in found] == [2 * ROWS] * 4
    assert [rows for rows, _, _ in flat] == [2 * ROWS + 2 * 2 * ROWS] * 4
