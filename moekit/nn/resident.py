"""Experts on a device that is smaller than the model: some of each layer are in slots, the others are fetched.

All experts of a rank have a home in host memory. :class:`Slots` are places for experts on the device, which all layers
share. What stays in them is up to a policy (policies.py); this file carries it out, and no policy changes a result.

A pass goes over a layer in rounds. A round computes with experts that are all in slots: first with those that were there
before, then with those fetched meanwhile, a few at a time, so that copies and products overlap. Each expert that a pass
needs is fetched once at most. A round is an ordinary assignment to the experts of an ordinary :class:`Experts`, the slots.

Shape letters: N rows, K choices a row, P choices, E experts held here, D model dim, B sequences.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from moekit.nn.experts import Assignment, Experts
from moekit.nn.operations import PLAIN
from moekit.nn.pinning import pin
from moekit.nn.policies import POLICIES, Hottest, Policy

if TYPE_CHECKING:
    from moekit.nn.transformer import Transformer

# Experts that are fetched together, while those before are computed with.
CHUNK = 8
# The most choices of a round, but for a single expert's: the hidden layer of the experts takes memory for these.
ROUND = 16_384
# With more requests than this, a pass fetches first and counts its hits meanwhile.
MANY = 2048
# An expert that follows another in more than this share of passes is predicted. A copy that is not needed delays those
# that are, so a prediction has to be right more often than not.
LIKELY = 0.5


def transit(held: int) -> int:
    """The slots that a rank has beside those for the experts that stay; it holds ``held`` experts a layer."""
    return 2 * min(CHUNK, held)


@dataclass
class Counts:
    """What happened in a layer since it was last asked.

    Attributes:
        requests: choices of tokens, of experts held here.
        hits: those whose expert was in a slot, in the order of the text (:class:`~moekit.nn.policies.Policy`).
        copied: experts copied to the device, ahead of time or not. A pass copies an expert that is not there once, for all of
            its tokens, and needs no copy of one that is there when it begins.
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


class Slots:
    """Room for ``count`` experts on ``device``, of the kind of ``like``."""

    def __init__(self, like: Experts, count: int, device: torch.device):
        stacks = {
            name: torch.empty(count, *stack.shape[1:], dtype=stack.dtype, device=device)
            for name, stack in like.stacks().items()
        }
        self.experts = like.over(stacks)
        self.count, self.device = count, device
        self.nbytes = sum(stack.nbytes for stack in stacks.values())
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Free slots, and what has to be over on the device before each is written to.
        self.free: deque[tuple[int, torch.cuda.Event | None]] = deque((slot, None) for slot in range(count))
        # What a step in parts has still to do once its products are under way.
        self.open: Iterator[object] | None = None
        # The layer that came before in a small pass, and what it requested.
        self.previous: tuple[Resident, list[int]] | None = None
        self.layers: list[Resident] = []

    def fetch(self, home: Experts, wanted: Sequence[int]) -> dict[int, int]:
        """Begin to copy experts from their home; returns the slot of each."""
        found = {}
        stacks, homes = self.experts.stacks(), home.stacks()
        with torch.cuda.stream(self.stream):
            for expert in wanted:
                slot, over = self.free.popleft()
                if over is not None:
                    self.stream.wait_event(over)
                for name, stack in homes.items():
                    stacks[name][slot].copy_(stack[expert], non_blocking=True)
                found[expert] = slot
        return found

    def arrival(self) -> torch.cuda.Event | None:
        """What is over once all copies that have begun are complete."""
        return None if self.stream is None else self.stream.record_event()

    def wait(self, arrival: torch.cuda.Event | None) -> None:
        """Have what the device computes from now on wait for copies."""
        if arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(arrival)

    def release(self, slots: Sequence[int]) -> None:
        """Give slots back, once what the device has been asked to compute so far is over."""
        over = None if self.stream is None else torch.cuda.current_stream(self.device).record_event()
        self.free.extend((slot, over) for slot in slots)

    def forget(self) -> None:
        """Begin again with free slots, and with policies that have seen nothing."""
        self.open = self.previous = None
        self.free.clear()
        self.release(range(self.count))
        for layer in self.layers:
            layer.where, layer.ahead = {}, {}
            layer.absent[:] = True
            layer.policy.clear()

    def settle(self) -> None:
        """Finish what a step in parts has left open."""
        if self.open is not None:
            next(self.open, None)
            self.open = None


class Resident(nn.Module):
    """A layer's experts, at ``home`` in host memory, of which those that ``policy`` keeps are in ``slots``.

    It takes the place of :class:`Experts`, for inference.
    """

    operations = PLAIN

    def __init__(self, home: Experts, slots: Slots, policy: Policy, prefetch: bool = True):
        super().__init__()
        self.home, self.slots, self.policy, self.prefetch = home, slots, policy, prefetch
        self.held, self.width, self.activation = home.held, home.width, home.activation
        self.operations = home.operations
        self.counts = Counts()
        # The slots of the experts that stay, and of those that were fetched before their requests were known.
        self.where: dict[int, int] = {}
        self.ahead: dict[int, int] = {}
        self.arrival: torch.cuda.Event | None = None
        self.absent = np.ones(self.held, dtype=bool)
        # The MoE layer behind this one. Of each expert here and each one there: small passes in which the one was
        # requested and the other was in no slot, and of these those in which the other was requested, too.
        self.behind: list[Resident] = []
        self.seen, self.pairs = np.zeros((2, self.held, self.held), dtype=np.int32)

    # ------------------------------------------------------------------------------------------- a pass

    def forward(self, x: Tensor, assignment: Assignment) -> Tensor:
        """Compute :meth:`moekit.nn.experts.Experts.forward`; asks the device for the choices' experts, and nothing else."""
        self.slots.settle()
        order, choices, weights = assignment.order, assignment.choices, assignment.weights
        chosen = self._chosen(assignment)
        requests = chosen[chosen < self.held]
        requests = requests if len(requests) > MANY else requests.tolist()
        out = x.new_zeros(len(x) * choices, x.shape[1])
        ends = np.bincount(np.asarray(requests, dtype=np.int64), minlength=self.held).cumsum().tolist()
        whole = assignment.whole or (len(order), self.held)
        for places in self.rounds(requests):
            parts = [order[ends[e - 1] if e else 0 : ends[e]] for e in places]
            mine = torch.cat(parts)
            counts = np.zeros(self.slots.count, dtype=np.int64)
            counts[list(places.values())] = [len(part) for part in parts]
            part = Assignment(
                torch.arange(len(mine), device=x.device),
                to_device(torch.from_numpy(counts), x.device),
                weights=None if weights is None else weights[mine],
                whole=whole,
            )
            done = self.operations.experts_ffn(self.slots.experts, x[mine // choices], part)
            out.index_copy_(0, mine, done)
        return out

    def _chosen(self, assignment: Assignment) -> np.ndarray:
        """[P]: the expert of each choice in the order of the rows, E for those that are no expert's."""
        order, counts = assignment.order, assignment.counts
        index = torch.arange(len(order), device=order.device)
        expert = torch.searchsorted(counts.cumsum(0), index, right=True)
        chosen = torch.empty(len(order), dtype=torch.int16, device=order.device)
        return chosen.scatter_(0, order, expert.short()).cpu().numpy()

    def rounds(self, requests: Sequence[int] | np.ndarray) -> Iterator[dict[int, int]]:
        """Have the experts of ``requests`` in slots, some of them a round.

        Yields:
            The slots of a round's experts, in the order of slots. What is to be computed with them has to be under way
            before the next round. Where few of few experts are missing, there is one round.
        """
        complete = False
        try:
            yield from self._rounds(requests)
            complete = True
        finally:
            if not complete:
                # An error or an interrupt came between a policy and what it decided.
                self.slots.forget()

    def _rounds(self, requests: Sequence[int] | np.ndarray) -> Iterator[dict[int, int]]:
        slots, many = self.slots, len(requests) > MANY
        needed = dict(sorted(Counter(requests if isinstance(requests, list) else requests.tolist()).items()))
        if many:
            kept = self.policy.after(requests)
        else:
            self.counts.hits += self.policy.take(requests)
            kept = self.policy.kept
        self.counts.requests += len(requests)

        self._note(list(needed))
        here = self._here(needed)
        gone = [expert for expert in self.where if expert not in kept and expert not in needed]
        self.absent[gone] = True
        slots.release([self.where.pop(expert) for expert in gone])
        absent = [expert for expert in needed if expert not in here]
        chunks = [absent[i : i + CHUNK] for i in range(0, len(absent), CHUNK)]
        if len(chunks) <= 1:
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
        self.counts.copied += len(wanted)
        self.counts.nbytes += len(wanted) * self.slots.nbytes // max(1, self.slots.count)
        return self.slots.fetch(self.home, wanted)

    def _here(self, needed: dict[int, int]) -> dict[int, int]:
        """The slots of the needed experts that are there; those that were fetched in vain are free again."""
        here = {expert: slot for expert, slot in self.where.items() if expert in needed}
        used = {expert: slot for expert, slot in self.ahead.items() if expert in needed}
        self.slots.release([slot for expert, slot in self.ahead.items() if expert not in needed])
        self.ahead = {}
        if used:
            self.slots.wait(self.arrival)
        self.counts.used += len(used)
        return here | used

    def _computed(
        self, places: dict[int, int], needed: dict[int, int], kept: set[int]
    ) -> Iterator[dict[int, int]]:
        """Rounds with the experts in ``places``; afterwards those that are not kept give their slots back."""
        by_slot = sorted(places.items(), key=lambda place: place[1])
        part: dict[int, int] = {}
        room = ROUND
        for expert, slot in by_slot:
            if part and needed[expert] > room:
                yield part
                part, room = {}, ROUND
            part[expert] = slot
            room -= needed[expert]
        if part:
            yield part
        stay = {expert: slot for expert, slot in places.items() if expert in kept}
        leave = {expert: slot for expert, slot in places.items() if expert not in kept}
        self.where |= stay
        for expert in leave:
            self.where.pop(expert, None)
        self.absent[list(stay)], self.absent[list(leave)] = False, True
        self.slots.release(list(leave.values()))

    def _note(self, requested: list[int]) -> None:
        """Count which experts were requested after which of the layer before."""
        before, self.slots.previous = self.slots.previous, None
        if len(requested) > CHUNK:
            return
        if before is not None and before[0].behind == [self]:
            layer, earlier = before
            layer.seen[earlier] += self.absent
            missed = [expert for expert in requested if self.absent[expert]]
            layer.pairs[np.ix_(earlier, missed)] += 1
        if self.prefetch and self.behind:
            self.slots.previous = self, requested

    def _look_ahead(self) -> None:
        """Begin to copy those experts of the next MoE layer that most likely follow."""
        if self.slots.previous is None:
            return
        (behind,), (_, requested) = self.behind, self.slots.previous
        seen = self.seen[requested]
        # By one standard deviation of how often an expert would follow by a fair coin.
        likely = (self.pairs[requested] > LIKELY * seen + np.sqrt(seen) / 2).any(axis=0) & behind.absent
        wanted = [expert for expert in np.flatnonzero(likely).tolist() if expert not in behind.ahead]
        wanted = wanted[: CHUNK - len(behind.ahead)]
        if wanted:
            behind.ahead |= behind._fetch(wanted)
            behind.arrival = self.slots.arrival()
            behind.counts.ahead += len(wanted)

    # --------------------------------------------------------------------------------- a step in parts

    def bring(self, chosen: Tensor, places: Tensor) -> None:
        """Have the experts of ``chosen`` [B, K] in slots, and write each one's slot to ``places`` [B, K] int64.

        They stay there until the next layer's are asked for. B K is at most ``CHUNK``.
        """
        self.slots.settle()
        experts = chosen.flatten().tolist()
        self.slots.open = self.rounds(experts)
        found = next(self.slots.open)
        slots = torch.tensor([found[expert] for expert in experts]).view(chosen.shape)
        places.copy_(slots.pin_memory() if places.is_cuda else slots, non_blocking=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on ``device``, without waiting for what runs there."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


# --------------------------------------------------------------------------------------- a model's experts


@dataclass(frozen=True)
class Residence:
    """How many of a layer's experts are on the device of their rank, and which.

    Attributes:
        count: N.
        policy: the name of one of :data:`~moekit.nn.policies.POLICIES`; or how hot each expert of each MoE layer is,
            [L, all experts], where the hottest stay always.
        prefetch: copy experts of the next layer that this layer's choices predict.
    """

    count: int
    policy: str | np.ndarray = "lru"
    prefetch: bool = True

    def of_layer(self, layer: int, held: range) -> Policy:
        """The policy of MoE layer number ``layer``, counted from 0, on the rank that holds the experts ``held``."""
        count = min(self.count, len(held))
        if isinstance(self.policy, str):
            return POLICIES[self.policy](len(held), count)
        return Hottest(len(held), count, self.policy[layer, held.start : held.stop])


def install(model: Transformer, residence: Residence, held: range, device: torch.device) -> None:
    """Have the experts of ``model``, which are in host memory, compute in slots on ``device``."""
    moes = [model.layers[layer].moe for layer in model.config.moe_layers]
    homes = [moe.experts for moe in moes]
    count = len(homes) * min(residence.count, len(held)) + transit(len(held))
    model.slots = Slots(homes[0], count, device)
    for number, (moe, home) in enumerate(zip(moes, homes, strict=True)):
        if device.type == "cuda":
            pin(home)
        policy = residence.of_layer(number, held)
        moe.experts = Resident(home, model.slots, policy, residence.prefetch)
    model.slots.layers = [moe.experts for moe in moes]
    for layer, behind in itertools.pairwise(model.slots.layers):
        layer.behind = [behind]
    begin(model)


def begin(model: Transformer) -> None:
    """Begin again: slots as the policies have them at the start, counts of zero, and nothing seen of what follows what."""
    slots = model.slots
    slots.settle()
    slots.forget()
    for layer in slots.layers:
        layer.counts = Counts()
        layer.seen[:], layer.pairs[:] = 0, 0
        layer.where = slots.fetch(layer.home, sorted(layer.policy.kept))
        layer.absent[list(layer.where)] = False
    slots.wait(slots.arrival())
