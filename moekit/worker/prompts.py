"""Prompts on their way to the ranks, as one array for each rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from moekit.symbols import PAD


@dataclass(frozen=True)
class Prompts:
    """What a rank knows of the starts of the sequences that are generated together.

    Attributes:
        numbers: the numbers of this rank's B sequences among all sequences.
        tokens: [B, T] int32, the ids of their prompts, the leading symbol included, padded on the right with ``PAD``.
        lengths: [B] int64, the ids of each of them.
        on_ranks: for every rank the lengths of its prompts, as ints, which travel fastest: joint decisions must depend on values
            that all ranks have.
    """

    numbers: Sequence[int]
    tokens: np.ndarray
    lengths: np.ndarray
    on_ranks: Sequence[Sequence[int]]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: slice) -> Prompts:
        """Some of this rank's prompts, without what is padding in all of them."""
        lengths = self.lengths[rows]
        return Prompts(self.numbers[rows], self.tokens[rows, : lengths.max()], lengths, self.on_ranks)

    def passes(self, alone: bool) -> list[Prompts]:
        """What this rank reads in each forward pass: its prompts together, or each prompt ``alone``."""
        if alone:
            return [self[row : row + 1] for row in range(len(self))]
        return [self] if len(self) else []

    def shapes(self, alone: bool) -> list[list[tuple[int, int]]]:
        """(B, T) of each rank's forward passes."""
        if alone:
            return [[(1, length) for length in lengths] for lengths in self.on_ranks]
        return [[(len(lengths), max(lengths))] if lengths else [] for lengths in self.on_ranks]


def dealt(
    numbers: Sequence[Sequence[int]], ids: Sequence[Sequence[Sequence[int] | np.ndarray]]
) -> list[Prompts]:
    """What each rank gets, from the numbers of its sequences and the ids of their prompts."""
    on_ranks = [list(map(len, own)) for own in ids]
    lengths = [np.array(own, np.int64) for own in on_ranks]
    return [
        Prompts(mine, _padded(own, each), each, on_ranks)
        for mine, own, each in zip(numbers, ids, lengths, strict=True)
    ]


def most_tokens(shapes: Sequence[Sequence[tuple[int, int]]]) -> list[int]:
    """The most tokens, padding included, that any rank brings to each pass; ``shapes`` are those of each rank's passes."""
    together = zip_longest(*shapes, fillvalue=(0, 0))
    return [max(rows * length for rows, length in ranks) for ranks in together]


def _padded(ids: Sequence[Sequence[int] | np.ndarray], lengths: np.ndarray) -> np.ndarray:
    tokens = np.full((len(ids), lengths.max(initial=0)), PAD, np.int32)
    if len(ids):
        tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = np.concatenate(ids)
    return tokens
