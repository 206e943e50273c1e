"""Sequences that live on the ranks while they are generated."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moekit.generation.request import Request
from moekit.symbols import PAD
from moekit.worker import decoding as decode
from moekit.worker.decoding import Prompt
from moekit.worker.sampling import Candidates, Chosen

if TYPE_CHECKING:
    from moekit.handle import Handle


# Whether to drop finished sequences from the batch at once; on a GPU this costs more time than it saves.
MOVES = {"cpu": True, "cuda": False}


class Session:
    """Sequences that live on the ranks while they are generated.

    Attributes:
        sequences: for each rank the numbers of its sequences, in the order of their rows on the rank.
        parts: the parts of the trace, after the end of the session.
    """

    keys = itertools.count()

    def __init__(self, model: Handle, prompts: Sequence[Prompt], request: Request):
        self.model, self.settings, self.slots = model, request.settings, request.slots(prompts)
        self.key = next(self.keys)
        self.prompts = [prompts[rank :: model.world_size] for rank in range(model.world_size)]
        self.sequences = [[prompt.number for prompt in part] for part in self.prompts]
        self.rows_each = 1
        self.parts: list[dict[str, np.ndarray]] = []

    def begin(self) -> dict[int, Chosen | Candidates]:
        """Prefill the prompts. Returns, for the number of each sequence, its row of the ranks' proposals."""
        abandoned = tuple(self.model.abandoned)
        found = self.model.ranks.call(
            decode.begin, self.key, self.prompts, self.settings, self.slots, abandoned
        )
        del self.model.abandoned[: len(abandoned)]
        return self._by_sequence(found)

    def sample(self, tokens: Mapping[int, int], steps: int) -> dict[int, Chosen]:
        """Run ``steps`` decode steps of the sequences in ``tokens``; the others are finished.

        Args:
            tokens: the token that each sequence reads first.
        """
        kept = set(tokens)
        listens = self.settings.trace is not None or self.settings.record is not None
        if not MOVES[self.model.device] and not listens and 2 * len(kept) > sum(map(len, self.sequences)):
            # Finished sequences keep their rows and read padding; their results are left out below.
            kept = {number for numbers in self.sequences for number in numbers}
        rows = [[row for row, n in enumerate(numbers) if n in kept] for numbers in self.sequences]
        self.sequences = [[n for n in numbers if n in kept] for numbers in self.sequences]
        inputs = [[tokens.get(n, PAD) for n in numbers] for numbers in self.sequences]
        found = self._by_sequence(self.model.ranks.call(decode.run, self.key, rows, inputs, steps))
        return {number: row for number, row in found.items() if number in tokens}

    def search(
        self, beams: Mapping[int, Sequence[tuple[int, int, float]]], last: bool
    ) -> dict[int, Candidates]:
        """Run one decode step of the beams of each sequence in ``beams``; the other sequences are finished.

        Args:
            beams: for each sequence its beams: (the beam of the step before, the token to read, the score so far).
            last: whether only ``</s>`` may follow.
        """
        rows, inputs, scores = [], [], []
        for numbers in self.sequences:
            mine = [(place, beam) for place, n in enumerate(numbers) for beam in beams.get(n, ())]
            rows.append([place * self.rows_each + beam for place, (beam, _, _) in mine])
            inputs.append([token for _, (_, token, _) in mine])
            scores.append([score for _, (_, _, score) in mine])
        self.sequences = [[n for n in numbers if n in beams] for numbers in self.sequences]
        self.rows_each = self.settings.beam_size
        return self._by_sequence(self.model.ranks.call(decode.grow, self.key, rows, inputs, scores, last))

    def _by_sequence(self, found: Sequence[Chosen | Candidates | None]) -> dict[int, Chosen | Candidates]:
        rows = {}
        for numbers, part in zip(self.sequences, found, strict=True):
            if part is not None:
                rows |= {n: part._make(row) for n, row in zip(numbers, zip(*part, strict=True), strict=True)}
        return dict(sorted(rows.items()))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.parts = [part for parts in self.model.ranks.call(decode.end, self.key) for part in parts]
        except RuntimeError:
            # The ranks are busy with another call, or they have ended together with their sequences.
            self.model.abandoned.append(self.key)
