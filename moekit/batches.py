"""A batch: the unit in which fairseq routes, and texts as batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moekit.symbols import EOS, PAD


@dataclass(frozen=True)
class Batch:
    """One forward call of fairseq, the unit in which it routes.

    Attributes:
        index: its place in fairseq's order.
        ids: [B], the samples' ids.
        tokens: [B, T] int32, the input, padded on the right with ``PAD``.
        targets: [B, T] int32, the next tokens, ``PAD`` where there is none to predict.
        starts: [B], where a sample's own targets begin: after its context (``context_window``).
    """

    index: int
    ids: np.ndarray
    tokens: np.ndarray
    targets: np.ndarray
    starts: np.ndarray

    def padded(self) -> bool:
        return bool((self.tokens == PAD).any())

    def scored(self, row: int) -> np.ndarray:
        """[T] bool: the targets of a sample that count, in fairseq's ``SequenceScorer`` (padding is cut out)."""
        real = self.targets[row] != PAD
        real[: self.starts[row]] = False
        return real


def text_batches(
    texts: Sequence[Sequence[int]], batch_size: int, max_positions: int, first: int = EOS
) -> list[Batch]:
    """Texts (their ids) as batches of ``batch_size``, in order: one sample per text, which begins with the symbol ``first``.

    Position p predicts the text's token p; the last token is an input without a target. Padded on the right.

    Raises:
        ValueError: a text is longer than the model has positions for, or empty.
    """
    for number, ids in enumerate(texts):
        if not 1 <= len(ids) < max_positions:
            raise ValueError(
                f"text {number} has {len(ids)} tokens; expected 1 to {max_positions - 1}, as one symbol precedes them"
            )
    batches = []
    for index, start in enumerate(range(0, len(texts), batch_size)):
        some = texts[start : start + batch_size]
        tokens = np.full((len(some), 1 + max(map(len, some))), PAD, dtype=np.int32)
        targets = tokens.copy()
        for row, ids in enumerate(some):
            tokens[row, : len(ids) + 1] = [first, *ids]
            targets[row, : len(ids)] = ids
        ids = np.arange(start, start + len(some))
        batches.append(Batch(index, ids, tokens, targets, np.zeros(len(some), dtype=np.int64)))
    return batches


def up_to(batches: Iterable[Batch], max_tokens: int) -> Iterator[Batch]:
    """Batches until the next one would make it more than ``max_tokens`` real tokens, but at least one."""
    total = 0
    for batch in batches:
        total += int((batch.tokens != PAD).sum())
        if total > max_tokens and batch.index > 0:
            return
        yield batch
