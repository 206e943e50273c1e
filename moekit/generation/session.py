"""Sequences that live on the ranks while they are generated."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moekit.generation.request import Request
from moekit.nn.config import PAD
from moekit.worker import decoding as decode
from moekit.worker.decoding import Prompt
from moekit.worker.sampling import Candidates, Chosen, Settings

if TYPE_CHECKING:
    from moekit.handle import Handle


MOVES = {"cpu": True, "cuda": False}


class Session:
    """Sequences that live on the ranks while they are generated."""

    keys = itertools.count()

    def __init__(self, model: Handle, prompts: Sequence[Prompt], settings: Settings, slots: int):
        self.model, self.settings, self.slots = model, settings, slots
        self.key = next(self.keys)
        self.dealt = [prompts[rank :: model.world_size] for rank in range(model.world_size)]
        self.there = [[prompt.number for prompt in part] for part in self.dealt]  # in the order of the rows
        self.beams = 1  # rows a sequence
        self.parts: list[dict[str, np.ndarray]] = []  # of the trace, once it is over

    def begin(self) -> dict[int, Chosen | Candidates]:
        """Read the prompts. Returns, for each sequence's number, its row of what the ranks propose."""
        abandoned = tuple(self.model.abandoned)
        found = self.model.ranks.call(
            decode.begin, self.key, self.dealt, self.settings, self.slots, abandoned
        )
        del self.model.abandoned[: len(abandoned)]
        return self._by_number(found)

    def run(self, going: Mapping[int, int], steps: int) -> dict[int, Chosen]:
        """``steps`` tokens on; sequences that are not in ``going`` are over.

        Args:
            going: the token that each sequence reads first.
        """
        keep = set(going)
        if not MOVES[self.model.device] and 2 * len(going) > sum(map(len, self.there)):
            keep = {n for numbers in self.there for n in numbers}  # the dead read padding, and nobody listens
        rows = [[place for place, n in enumerate(numbers) if n in keep] for numbers in self.there]
        self.there = [[n for n in numbers if n in keep] for numbers in self.there]
        tokens = [[going.get(n, PAD) for n in numbers] for numbers in self.there]
        found = self._by_number(self.model.ranks.call(decode.run, self.key, rows, tokens, steps))
        return {number: row for number, row in found.items() if number in going}

    def grow(
        self, going: Mapping[int, Sequence[tuple[int, int, float]]], last: bool
    ) -> dict[int, Candidates]:
        """One token on in a beam search; sequences that are not in ``going`` are over.

        Args:
            going: for each sequence its beams: (the beam it goes on from, the token it reads, its score so far).
            last: nothing but ``</s>`` may follow.
        """
        rows, tokens, scores = [], [], []
        for numbers in self.there:
            beams = [(place, beam) for place, n in enumerate(numbers) for beam in going.get(n, ())]
            rows.append([place * self.beams + beam for place, (beam, _, _) in beams])
            tokens.append([token for _, (_, token, _) in beams])
            scores.append([score for _, (_, _, score) in beams])
        self.there = [[n for n in numbers if n in going] for numbers in self.there]
        self.beams = self.settings.beam_size
        return self._by_number(self.model.ranks.call(decode.grow, self.key, rows, tokens, scores, last))

    def _by_number(self, found: Sequence[Chosen | Candidates | None]) -> dict[int, Chosen | Candidates]:
        rows = {}
        for numbers, part in zip(self.there, found, strict=True):
            if part is not None:
                rows |= {n: part._make(row) for n, row in zip(numbers, zip(*part, strict=True), strict=True)}
        return dict(sorted(rows.items()))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.parts = [part for parts in self.model.ranks.call(decode.end, self.key) for part in parts]
        except RuntimeError:  # the ranks are busy with another call, or gone, and the sequences with them
            self.model.abandoned.append(self.key)


def _slots(wave: Sequence[Prompt], request: Request) -> int:
    return max(len(prompt.ids) for prompt in wave) + request.max_new_tokens - 1
