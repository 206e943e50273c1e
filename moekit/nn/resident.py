"""Experts on a device that is smaller than the model: some of each layer are in slots, the others are fetched.

All experts of a rank have a home in host memory. Slots (slots.py) are places for experts on the device, which all layers
share. What stays in them is up to a policy (policies.py); this file carries it out, and no policy changes a result.

A pass goes over a layer in rounds. A round computes with experts that are all in slots: first with those that were there
before, then with those fetched meanwhile, a few at a time, so that copies and products overlap. Each expert that a pass
needs, or a request of a step in parts, is fetched once at most. A round is an ordinary assignment to the experts of an ordinary :class:`Experts`, the slots.

Shape letters: N rows, K choices a row, P choices, E experts held here, D model dim, B sequences.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from moekit.nn.experts import Assignment, Experts, expert_of
from moekit.nn.operations import PLAIN
from moekit.nn.parts import FETCH, part
from moekit.nn.pinning import pin
from moekit.nn.policies import POLICIES, USUAL, Hottest, Policy
from moekit.nn.slots import CHUNK, Slots, grow_in_place, transit
from moekit.nn.successors import Successors

if TYPE_CHECKING:
    from moekit.nn.transformer import Transformer

# The most choices of a round, but for a single expert's: the hidden layer of the experts takes memory for these.
ROUND = 16_384
# With more requests than this, a pass fetches first and counts its hits meanwhile.
MANY = 2048


@dataclass
class Counts:
    """What happened in a layer since loading, or since :func:`begin`.

    Attributes:
        requests: choices of experts held here. Rows of padding count: a rank cannot tell them among the rows that others send.
        hits: those whose expert was in a slot, in the order of the text (:class:`~moekit.nn.policies.Policy`).
        copied: experts copied to the device, ahead of time or not. A pass, or a request of a step in parts, copies an expert
            that is not there once, for all of its tokens, and needs no copy of one that is there when it begins.
        ahead: of those, copied for the next pass of the layer before its requests were known.
        used: of those, requested by it.
        nbytes: of what was copied.
    """

    requests: int = 0
    hits: int = 0
    copied: int = 0
    ahead: int = 0
    used: int = 0
    nbytes: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


class Resident(nn.Module):
    """A layer's experts, at ``home`` in host memory, of which those that ``policy`` keeps are in ``slots``.

    It takes the place of :class:`Experts`, for inference.
    """

    operations = PLAIN

    def __init__(self, home: Experts, slots: Slots, policy: Policy, prefetch: bool, layer: int):
        super().__init__()
        self.home, self.slots, self.policy, self.prefetch, self.layer = home, slots, policy, prefetch, layer
        self.held, self.width, self.activation = home.held, home.width, home.activation
        self.operations = home.operations
        self.homes = home.stacks()
        self.counts = Counts()
        # The slots of the experts that stay, and of those that were fetched before their requests were known.
        self.where: dict[int, int] = {}
        self.ahead: dict[int, int] = {}
        self.arrival: torch.cuda.Event | None = None
        # The next MoE layer; none follows the last one. It is in a list, because torch makes any module that is an attribute
        # a part of this one.
        self.following: list[Resident] = []
        self.successors = Successors(self.held)
        # A step in parts sends experts to the host, and the host answers with their slots.
        self.asked, self.told = torch.zeros(
            2, CHUNK, dtype=torch.long, pin_memory=slots.device.type == "cuda"
        )

    # ------------------------------------------------------------------------------------------- a pass

    def forward(self, x: Tensor, assignment: Assignment) -> Tensor:
        """As :meth:`moekit.nn.experts.Experts.forward`; it reads the choices' experts back from the device, and nothing else."""
        self.slots.settle()
        order, choices, weights = assignment.order, assignment.choices, assignment.weights
        # Fewer bytes come to the host as int16.
        chosen = expert_of(assignment).short().cpu().numpy()
        requests = chosen[chosen < self.held]
        requests = requests if len(requests) > MANY else requests.tolist()
        out = x.new_zeros(len(x) * choices, x.shape[1])
        ends = np.bincount(np.asarray(requests, dtype=np.int64), minlength=self.held).cumsum().tolist()
        whole = assignment.whole or (len(order), self.held)
        for places in self.rounds(requests):
            parts = [order[ends[e - 1] if e else 0 : ends[e]] for e in places]
            mine = torch.cat(parts)
            counts = np.zeros(self.slots.count, dtype=np.int64)
            counts[list(places.values())] = [len(rows) for rows in parts]
            own = Assignment(
                torch.arange(len(mine), device=x.device),
                to_device(torch.from_numpy(counts), x.device),
                weights=None if weights is None else weights[mine],
                whole=whole,
            )
            rows = x[mine // choices]
            with part("experts"):
                done = self.operations.experts_ffn(self.slots.experts, rows, own)
            out.index_copy_(0, mine, done)
        return out

    def rounds(self, requests: list[int] | np.ndarray, ahead: bool = True) -> Iterator[dict[int, int]]:
        """Bring the experts of ``requests`` into slots, some of them in each round.

        Args:
            ahead: whether they foretell experts of the next layer, where they are few.

        Yields:
            The experts of a round with their slots, in the order of slots. The caller launches what it computes with them
            before it asks for the next round. There is one round if few experts are missing and few are requested.
        """
        complete = False
        try:
            yield from self._rounds(requests, ahead)
            complete = True
        finally:
            if not complete:
                # An error or an interrupt came between a policy and what it decided.
                self.slots.forget()

    def _rounds(self, requests: list[int] | np.ndarray, ahead: bool) -> Iterator[dict[int, int]]:
        slots, many = self.slots, len(requests) > MANY
        if many:
            needed = dict(
                zip(*(found.tolist() for found in np.unique(requests, return_counts=True)), strict=True)
            )
            hits, kept = 0, self.policy.after(requests)
        else:
            needed = dict(sorted(Counter(requests).items()))
            hits, kept = self.policy.take(requests), self.policy.kept
        self.counts.requests += len(requests)
        self.counts.hits += hits

        here = {expert: self.where[expert] for expert in needed if expert in self.where}
        self._note(needed, here, ahead)
        if self.ahead:
            here |= self._foreseen(needed)
        if hits < len(requests):
            # Where all requests hit, nothing leaves.
            gone = [expert for expert in self.where.keys() - kept if expert not in needed]
            slots.release([self.where.pop(expert) for expert in gone])
        absent = [expert for expert in needed if expert not in here]
        chunks = [absent[i : i + CHUNK] for i in range(0, len(absent), CHUNK)]
        if len(chunks) <= 1:
            if absent:
                here |= self._fetch(absent)
                slots.wait(slots.arrival())
            self._look_ahead()
            yield from self._computed(here, needed, kept)
        else:
            coming = self._fetch(chunks[0])
            arrival = slots.arrival()
            yield from self._computed(here, needed, kept)
            for following in [*chunks[1:], []]:
                now, ready = coming, arrival
                coming = self._fetch(following)
                arrival = slots.arrival()
                slots.wait(ready)
                yield from self._computed(now, needed, kept)
        if many:
            self.counts.hits += self.policy.take(requests.tolist())

    def _fetch(self, wanted: Sequence[int]) -> dict[int, int]:
        nbytes = len(wanted) * self.slots.each
        self.counts.copied += len(wanted)
        self.counts.nbytes += nbytes
        # The host asks for them outside of this layer, too: ahead, and between the graphs of a step in parts.
        with part(f"layer {self.layer}"), part(f"{FETCH} {nbytes}"):
            return self.slots.fetch(self.homes, wanted)

    def _foreseen(self, needed: Container[int]) -> dict[int, int]:
        """The slots of the needed experts that were fetched ahead; the slots of the others fetched ahead become free."""
        used = {expert: slot for expert, slot in self.ahead.items() if expert in needed}
        self.slots.release([slot for expert, slot in self.ahead.items() if expert not in needed])
        self.ahead = {}
        if used:
            self.slots.wait(self.arrival)
        self.counts.used += len(used)
        return used

    def _computed(
        self, places: dict[int, int], needed: dict[int, int], kept: Container[int]
    ) -> Iterator[dict[int, int]]:
        """Rounds with the experts in ``places``; afterwards those that are not kept give their slots back."""
        some: dict[int, int] = {}
        room = ROUND
        for expert, slot in sorted(places.items(), key=lambda place: place[1]):
            if some and needed[expert] > room:
                yield some
                some, room = {}, ROUND
            some[expert] = slot
            room -= needed[expert]
        if some:
            yield some
        leave = []
        for expert, slot in places.items():
            if expert in kept:
                self.where[expert] = slot
            else:
                self.where.pop(expert, None)
                leave.append(slot)
        self.slots.release(leave)

    def _note(self, requested: Collection[int], here: Container[int], ahead: bool) -> None:
        """Count, for each expert that the layer before requested, which of ``requested`` were in no slot here.

        Args:
            here: those of ``requested`` that are in slots.
            ahead: as in :meth:`rounds`.
        """
        before, self.slots.previous = self.slots.previous, None
        if not self.prefetch or not ahead or len(requested) > CHUNK:
            return
        if before is not None and before[0].following == [self]:
            missed = [expert for expert in requested if expert not in here]
            before[0].successors.note(before[1], missed, self.where)
        if self.following:
            self.slots.previous = self, list(requested)

    def _look_ahead(self) -> None:
        """Begin to copy the experts of the next MoE layer that are likely to be missed there."""
        if self.slots.previous is None:
            return
        (following,), (_, requested) = self.following, self.slots.previous
        likely = dict.fromkeys(self.successors.likely(requested))
        wanted = [
            expert for expert in likely if expert not in following.where and expert not in following.ahead
        ]
        wanted = wanted[: CHUNK - len(following.ahead)]
        if wanted:
            following.ahead |= following._fetch(wanted)
            following.arrival = self.slots.arrival()
            following.counts.ahead += len(wanted)

    # --------------------------------------------------------------------------------- a step in parts

    def ask(self, chosen: Tensor, ahead: bool = True) -> Callable[[], None]:
        """Send the experts of ``chosen`` [B, K] to the host; B K is at most ``CHUNK``.

        Neither this nor :meth:`places` reads a number back from the device, as a CUDA graph requires.

        Args:
            ahead: whether they foretell experts of the next layer, which are then fetched, too.

        Returns:
            What the host has to call before :meth:`places`: it brings the experts into slots.
        """
        count = chosen.numel()
        self.asked[:count].view(chosen.shape).copy_(chosen, non_blocking=True)
        return functools.partial(self._bring, count, ahead)

    def _bring(self, count: int, ahead: bool) -> None:
        """Have the experts asked for in slots; they stay there until the next layer's are asked for."""
        self.slots.settle()
        if self.slots.stream is not None:
            torch.cuda.current_stream(self.slots.device).synchronize()
        experts = self.asked[:count].tolist()
        self.slots.open = self.rounds(experts, ahead)
        found = next(self.slots.open)
        self.told.numpy()[:count] = [found[expert] for expert in experts]

    def places(self, chosen: Tensor) -> Tensor:
        """[B, K] int64, the slots of the experts that :meth:`ask` asked for."""
        return self.told[: chosen.numel()].view(chosen.shape).to(chosen.device, non_blocking=True, copy=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on ``device``, without waiting for what runs there."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


# --------------------------------------------------------------------------------------- a model's experts


@dataclass(frozen=True)
class Residence:
    """How many of a layer's experts are on the device of their rank, and which.

    Attributes:
        count: the experts of a layer that are on the device of their rank.
        policy: the name of one of :data:`~moekit.nn.policies.POLICIES`; or [L, E], how often each expert of each MoE layer
            is requested, where the most requested ones stay always.
        prefetch: copy experts of the next layer that this layer's choices predict.
    """

    count: int
    policy: str | np.ndarray = USUAL
    prefetch: bool = True

    def of_layer(self, layer: int, held: range, numbers: Tensor | None = None) -> Policy:
        """The policy of MoE layer number ``layer``, counted from 0, on the rank that holds the experts ``held``.

        Args:
            numbers: [all experts], those that the dispatch knows them by, and that ``held`` means; None: their own.
        """
        count = min(self.count, len(held))
        if isinstance(self.policy, str):
            return POLICIES[self.policy](len(held), count)
        heat = self.policy[layer]
        if numbers is not None:
            # The expert with each number.
            heat = heat[np.argsort(numbers.cpu().numpy())]
        return Hottest(len(held), count, heat[held.start : held.stop])


def install(model: Transformer, residence: Residence, held: range, device: torch.device) -> None:
    """Replace the experts of ``model``, which are in host memory, by those that compute in slots on ``device``."""
    moes = [model.layers[layer].moe for layer in model.config.moe_layers]
    homes = [moe.experts for moe in moes]
    if device.type == "cuda":
        grow_in_place()
    count = len(homes) * min(residence.count, len(held)) + transit(len(held))
    model.slots = Slots(homes[0], count, device)
    for number, (moe, home) in enumerate(zip(moes, homes, strict=True)):
        if device.type == "cuda":
            pin(home)
        policy = residence.of_layer(number, held, moe.numbers)
        moe.experts = Resident(home, model.slots, policy, residence.prefetch, moe.index)
    model.slots.layers = [moe.experts for moe in moes]
    for layer, following in itertools.pairwise(model.slots.layers):
        layer.following = [following]
    begin(model)


def begin(model: Transformer) -> None:
    """Begin again: the policies' first experts in slots, counts of zero, and no tally of which expert follows which."""
    slots = model.slots
    slots.settle()
    slots.forget()
    for layer in slots.layers:
        layer.counts = Counts()
        layer.successors = Successors(layer.held)
        layer.where = slots.fetch(layer.homes, sorted(layer.policy.kept))
    slots.wait(slots.arrival())
