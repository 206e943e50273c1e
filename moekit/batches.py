"""A batch: the unit in which fairseq routes, and texts as batches."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moekit.nn.config import ModelConfig
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

    @functools.cached_property
    def _padded(self) -> bool:
        return bool((self.tokens == PAD).any())

    def padded(self) -> bool:
        """Whether it has padding; looked at once, since steps are planned before they are timed, and then again."""
        return self._padded

    def scored(self, row: int) -> np.ndarray:
        """[T] bool: the targets of a sample that count, in fairseq's ``SequenceScorer`` (padding is cut out)."""
        real = self.targets[row] != PAD
        real[: self.starts[row]] = False
        return real


@dataclass(frozen=True)
class Share:
    """What a rank knows of a step, whose batches have one shape and go to the ranks in turn.

    Attributes:
        batches: those of this rank, which run in one forward pass; none where the step has fewer batches than ranks.
        count: the number of batches of all ranks.
        shape: (B, T) of each batch.
        padded: whether the batches have padding; either all have or none.
        trailing: whether all padding of the step follows the text.
        arrived: the batches as one, as a rank gets them, of which ``batches`` are views.
    """

    batches: Sequence[Batch]
    count: int
    shape: tuple[int, int]
    padded: bool
    trailing: bool
    arrived: Batch | None = field(default=None, repr=False)

    def joined(self) -> Batch:
        """This rank's batches, one after the other, as one, whose index means nothing."""
        if self.arrived is not None:
            return self.arrived
        # They are not kept: those of all ranks are memory that the system has to find first.
        arrays = ([getattr(b, name) for b in self.batches or [_NOTHING]] for name in _ARRAYS)
        return Batch(-1, *map(np.concatenate, arrays))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as a few large arrays, which takes a tenth of the time of many small ones, in no more bytes than ids need."""
        whole = self.joined()
        tokens, targets = whole.tokens, whole.targets
        follows = np.array_equal(targets[:, :-1], tokens[:, 1:])
        if follows:
            # All targets but the last one of a sample are its tokens.
            targets = targets[:, -1:]
        index = [batch.index for batch in self.batches]
        arrays = whole.ids, _small(tokens), _small(targets), whole.starts
        return _unpickled, (index, *arrays, follows, self.count, self.shape, self.padded, self.trailing)

    def rows(self, world_size: int) -> int:
        """The most tokens that any rank has."""
        return -(-self.count // world_size) * self.shape[0] * self.shape[1]

    def padding_matters(self, config: ModelConfig, fraction: float | None) -> bool:
        """Whether a pass of a model of ``config`` needs a mask of the padding.

        Causal attention ignores padding behind the text, and without a capacity it displaces no token. With a context
        window there may be more columns than learned positions: then padding must not take one.
        """
        beyond = config.learned_positions and self.shape[1] > config.max_positions
        return self.padded and (fraction is not None or not self.trailing or beyond)


_ARRAYS = ("ids", "tokens", "targets", "starts")
# In place of the batches of a rank that has none.
_NOTHING = Batch(-1, *(np.empty(shape, np.int64) for shape in (0, (0, 1), (0, 1), 0)))


def _small(ids: np.ndarray) -> np.ndarray:
    """``ids`` in two bytes each, if they fit."""
    # All bits that any id has; a negative one has the first.
    bits = int(np.bitwise_or.reduce(ids, axis=None))
    return ids.astype(np.uint16) if 0 <= bits <= np.iinfo(np.uint16).max else ids


def _unpickled(
    index: list[int],
    ids: np.ndarray,
    tokens: np.ndarray,
    targets: np.ndarray,
    starts: np.ndarray,
    follows: bool,
    count: int,
    shape: tuple[int, int],
    padded: bool,
    trailing: bool,
) -> Share:
    tokens, targets = (array.astype(np.int32, copy=False) for array in (tokens, targets))
    if follows:
        targets = np.concatenate([tokens[:, 1:], targets], axis=1)
    at = range(0, shape[0] * len(index), shape[0])
    rows = [slice(start, start + shape[0]) for start in at]
    batches = [
        Batch(i, ids[row], tokens[row], targets[row], starts[row]) for i, row in zip(index, rows, strict=True)
    ]
    return Share(batches, count, shape, padded, trailing, Batch(-1, ids, tokens, targets, starts))


def shares(step: Sequence[Batch], world_size: int) -> list[Share]:
    """The share of each rank in a step."""
    padded = step[0].padded()
    trailing = not padded or all(
        bool((np.diff((batch.tokens == PAD).astype(np.int8)) >= 0).all()) for batch in step
    )
    return [
        Share(step[rank::world_size], len(step), step[0].tokens.shape, padded, trailing)
        for rank in range(world_size)
    ]


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
            tokens[row, 0], tokens[row, 1 : len(ids) + 1] = first, ids
            targets[row, : len(ids)] = ids
        ids = np.arange(start, start + len(some))
        batches.append(Batch(index, ids, tokens, targets, np.zeros(len(some), dtype=np.int64)))
    return batches


def count_scored(batches: Iterable[Batch]) -> int:
    """The targets of all samples that count."""
    return sum(int(batch.scored(row).sum()) for batch in batches for row in range(len(batch.ids)))


def lengths_of(batches: Iterable[Batch]) -> dict[int, int]:
    """The number of tokens of each sample, without padding; of those of one number in several data sets, the most."""
    lengths: dict[int, int] = {}
    for batch in batches:
        real = (batch.tokens != PAD).sum(axis=1).tolist()
        for sample, tokens in zip(batch.ids.tolist(), real, strict=True):
            lengths[sample] = max(tokens, lengths.get(sample, 0))
    return lengths


def up_to(batches: Iterable[Batch], max_tokens: int) -> Iterator[Batch]:
    """The first batches with at most ``max_tokens`` tokens together, without padding; at least one batch."""
    total = 0
    for batch in batches:
        total += int((batch.tokens != PAD).sum())
        if total > max_tokens and batch.index > 0:
            return
        yield batch
