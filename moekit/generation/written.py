"""New tokens as arrays with a row for each sequence, as the ranks send them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moekit.generation.text import Text
from moekit.worker.sampling import Chosen

if TYPE_CHECKING:
    from moekit.data.codec import Codec, Ids


@dataclass(frozen=True)
class Burst:
    """New tokens that the ranks chose in one call, S of each of n sequences.

    Attributes:
        numbers: [n] int64, the sequences' numbers, ascending.
        chosen: [n, S] arrays.
        lengths: [n] int64, how many of a row's tokens are the sequence's: those up to a stop text.
        stopped: [n] bool, whether the sequence ended with a stop text.
    """

    numbers: np.ndarray
    chosen: Chosen
    lengths: np.ndarray
    stopped: np.ndarray

    @classmethod
    def of(cls, numbers: np.ndarray, chosen: Chosen, texts: dict[int, Text]) -> Burst:
        """What counts of ``chosen``: of the sequences in ``texts``, the tokens up to the one that completes a stop text."""
        lengths, stopped = np.full(len(numbers), chosen.tokens.shape[1]), np.zeros(len(numbers), bool)
        if texts:
            for row, (number, tokens) in enumerate(
                zip(numbers.tolist(), chosen.tokens.tolist(), strict=True)
            ):
                if (place := texts[number].stops_at(tokens)) is not None:
                    lengths[row], stopped[row] = place, True
        return cls(numbers, chosen, lengths, stopped)

    def not_finite(self) -> list[int]:
        """The sequences with a log-probability that is not finite."""
        return self.numbers[_not_finite(self.chosen.logprobs, self.lengths)].tolist()


class Written:
    """All new tokens of a generation.

    Attributes:
        chosen: [n, max_new_tokens] arrays, with a row for each sequence.
        lengths: [n] int64, how many of a row's tokens there are.
        stopped: [n] bool, whether the sequence ended with a stop text.
        copies: sequences of each prompt.
        stop, codec: the stop texts, and what turns ids into text.
    """

    def __init__(
        self, count: int, new: int, alternatives: int, copies: int, stop: Sequence[str], codec: Codec | Ids
    ):
        best = (count, new, alternatives)
        self.chosen = Chosen(
            np.empty((count, new), np.int64),
            np.empty((count, new), np.float32),
            np.empty(best, np.int64),
            np.empty(best, np.float32),
        )
        self.lengths, self.stopped = np.zeros(count, np.int64), np.zeros(count, bool)
        self.copies, self.stop, self.codec = copies, stop, codec

    def add(self, burst: Burst) -> None:
        """Append new tokens of sequences that have equally many so far."""
        at = int(self.lengths[burst.numbers[0]])
        for own, column in zip(self.chosen, burst.chosen, strict=True):
            own[burst.numbers, at : at + column.shape[1]] = column
        self.lengths[burst.numbers] += burst.lengths
        self.stopped[burst.numbers] = burst.stopped

    def over(self) -> np.ndarray:
        """[n] bool, whether a sequence has its last token."""
        return self.stopped | (self.lengths == self.chosen.tokens.shape[1])

    def not_finite(self) -> list[int]:
        """The sequences with a log-probability that is not finite."""
        return _not_finite(self.chosen.logprobs, self.lengths).tolist()

    # ------------------------------------------- the fields of moekit.generation.request.Generation, by their names

    def prompt(self, number: int) -> int:
        return number // self.copies

    def text(self, number: int) -> str | None:
        if not self.codec.reads_text:
            return None
        text = Text(self.codec, ()).of(self.ids(number))
        return text[: min((at for stop in self.stop if (at := text.find(stop)) >= 0), default=None)]

    def ids(self, number: int) -> list[int]:
        return self.chosen.tokens[number, : self.lengths[number]].tolist()

    def logprobs(self, number: int) -> np.ndarray:
        return self.chosen.logprobs[number, : self.lengths[number]].copy()

    def finish_reason(self, number: int) -> str:
        return "stop" if self.stopped[number] else "length"

    def score(self, number: int) -> float:
        return float(self.logprobs(number).sum(dtype=np.float64))

    def alternatives(self, number: int) -> list[list[tuple[int, float]]]:
        return alternatives(*(column[number, : self.lengths[number]] for column in self.chosen[2:]))


def _not_finite(logprobs: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The rows of [n, S] log-probabilities in which one of the first ``lengths`` [n] is not finite."""
    rows, places = np.nonzero(~np.isfinite(logprobs))
    return np.unique(rows[places < lengths[rows]])


def alternatives(best: np.ndarray, logprobs: np.ndarray) -> list[list[tuple[int, float]]]:
    """The best tokens at each position, (id, logprob) each, of [n, A] arrays; empty where A is 0."""
    if best.shape[1] == 0:
        return []
    rows = zip(best.tolist(), logprobs.tolist(), strict=True)
    return [list(zip(*row, strict=True)) for row in rows]
