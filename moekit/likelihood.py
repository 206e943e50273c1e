"""Log-probabilities of many texts of different lengths: what shares a beginning is read once, and lengths are sorted.

A text costs a rank its tokens; padding costs as much. So texts of like lengths share a pass, and the choices of a question
share the reading of the question.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moekit.handle import Handle
from moekit.nn.cache import slots_for
from moekit.nn.gates import interacts
from moekit.nn.memory import TOKENS_A_PASS
from moekit.progress import bar as progress_bar
from moekit.ranks import Each, Stream
from moekit.symbols import PAD
from moekit.worker.branches import Branches, Found, parts_of, score_branches

# A shorter beginning is read again with each text: a pass of its own would cost more.
WORTH_SHARING = 8
# A text that would be padding by more than a fifth begins a new pass, if the one before it has an eighth of its tokens.
LEAST_FILLED, WORTH_A_PASS = 0.8, 1 / 8


@dataclass(frozen=True)
class Text:
    """A text to score.

    Attributes:
        ids: its ids, the symbol that begins it included.
        start: the first id that is scored, from 1.
    """

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Score:
    """Of the scored ids of a text, in order.

    Attributes:
        logprobs: [n] float32, natural log-probabilities.
        best: [n] bool, whether it is the most probable token there.
    """

    logprobs: np.ndarray
    best: np.ndarray


@dataclass(frozen=True)
class Family:
    """Texts (their numbers) that share their first ``shared`` ids; 0 shares nothing."""

    members: tuple[int, ...]
    shared: int
    longest: int

    @property
    def cost(self) -> int:
        return len(self.members) * (slots_for(self.longest) if self.shared else self.longest)


def score_texts(
    model: Handle, texts: Sequence[Text], *, fraction: float | None, seed: int, progress: bool = True
) -> list[Score]:
    """Score ``texts``, in their order; the result depends neither on the world size nor on what shares a pass.

    Args:
        fraction: the capacity in effect (:meth:`moekit.handle.Handle.capacity`); each text is a routing group.

    Raises:
        ValueError: an intervention forces a text or a position that is not there.
        moekit.ranks.RankError: a rank failed.
    """
    intervention = model.intervention
    if intervention is not None:
        intervention.check({number: len(text.ids) for number, text in enumerate(texts)})
    alone = interacts(model.config, fraction)
    forced = intervention is not None and bool(intervention.force)
    # Of a text without ids to score, the ranks are not asked.
    scores = [Score(np.empty(0, np.float32), np.empty(0, bool))] * len(texts)
    tokens = TOKENS_A_PASS[model.device]
    cached = 0 if alone or forced else model.cached_tokens
    steps = plan_steps(texts, model.world_size, tokens, cached, alone=alone)
    total = sum(len(text.ids) - text.start for text in texts)
    with progress_bar("scoring", total, " tokens", show=progress, delay=1.0) as bar:

        def take(rank: int, found: Found) -> None:
            """What a rank has found of a step, while the ranks go on with the next."""
            at = 0
            for number in found.samples.tolist():
                end = at + len(texts[number].ids) - texts[number].start
                scores[number] = Score(found.logprobs[at:end], found.best[at:end])
                at = end
            bar.update(at)

        model.ranks.call(
            score_branches,
            Stream(Each(parts_of(step), plain=True) for step in steps),
            fraction=fraction,
            vocab=model.vocab,
            seed=seed,
            intervention=intervention,
            on_report=take,
        )
    if not all(np.isfinite(score.logprobs).all() for score in scores):
        warnings.warn(
            "log-probabilities of some texts are not finite: model.score of such a text names the layer",
            RuntimeWarning,
            stacklevel=2,
        )
    return scores


def plan_steps(
    texts: Sequence[Text], world_size: int, tokens: int, cached: int, *, alone: bool
) -> Iterator[list[Branches | None]]:
    """Texts as steps, each with a part for every rank (None for a rank without any), the longest texts first.

    Args:
        tokens: of a part without beginnings, padding included.
        cached: slots of the cache of a part whose texts share beginnings, which are read once; 0: none do.
        alone: whether the tokens of a text change one another's routing. Then texts are not padded, and the last id is read
            like the others, as fairseq's ``SequenceScorer`` reads it.
    """
    families = sorted(
        _families(texts, cached), key=lambda f: (f.shared > 0, f.longest, f.shared), reverse=True
    )
    for _, some in itertools.groupby(families, key=lambda f: f.longest if alone else f.shared > 0):
        alike = list(some)
        total = sum(family.cost for family in alike)
        most = cached if alike[0].shared else tokens
        # As many tokens for every rank in every step.
        budget = total // (world_size * -(-total // (world_size * most)))
        parts = [_branches(texts, part, alone) for part in _packed(alike, budget)]
        for start in range(0, len(parts), world_size):
            step = parts[start : start + world_size]
            yield [*step, *[None] * (world_size - len(step))]


def _families(texts: Sequence[Text], cached: int) -> Iterator[Family]:
    beginnings: dict[tuple[int, ...], list[int]] = {}
    for number, text in enumerate(texts):
        if text.start >= len(text.ids):
            continue
        # The last id before the scored ones is read with them, as it predicts the first.
        key = text.ids[: text.start - 1] if cached and text.start > WORTH_SHARING else (-1, number)
        beginnings.setdefault(key, []).append(number)
    for key, numbers in beginnings.items():
        longest = max(len(texts[number].ids) for number in numbers) - 1
        most = max(1, cached // slots_for(longest))
        for start in range(0, len(numbers), most):
            some = tuple(numbers[start : start + most])
            yield Family(some, len(key) if len(some) > 1 else 0, longest)


def _packed(families: Sequence[Family], budget: int) -> Iterator[list[Family]]:
    """Neighbours, the longest first, that together, padded to it, have up to ``budget`` tokens, and little padding.

    Where beginnings are shared, the tokens are the slots of a cache in which each text has room for the longest beginning and
    for the longest of what follows one.
    """
    part: list[Family] = []
    members = longest = shared = rest = 0
    for family in families:
        short = family.longest < LEAST_FILLED * longest and members * longest > budget * WORTH_A_PASS
        members, longest = members + len(family.members), max(longest, family.longest)
        shared, rest = max(shared, family.shared), max(rest, family.longest - family.shared)
        room = slots_for(shared + rest) if shared else longest
        if part and (short or members * room > budget):
            yield part
            part, members, longest = [], len(family.members), family.longest
            shared, rest = family.shared, family.longest - family.shared
        part.append(family)
    if part:
        yield part


def _branches(texts: Sequence[Text], families: Sequence[Family], whole: bool) -> Branches:
    numbers = [number for family in families for number in family.members]
    shared = [family.shared for family in families for _ in family.members]
    # The last id predicts nothing that is scored.
    unread = 0 if whole else 1
    longest = max(
        len(texts[number].ids) - unread - skip for number, skip in zip(numbers, shared, strict=True)
    )
    tokens = np.full((len(numbers), longest), PAD, np.int32)
    targets = tokens.copy()
    for row, (number, skip) in enumerate(zip(numbers, shared, strict=True)):
        ids, start = texts[number].ids, texts[number].start
        tokens[row, : len(ids) - unread - skip] = ids[skip : len(ids) - unread]
        targets[row, start - 1 - skip : len(ids) - 1 - skip] = ids[start:]
    samples = np.array(numbers, np.int64)
    if not families[0].shared:
        return Branches(samples, tokens, targets)
    lengths = np.array([family.shared for family in families], np.int64)
    beginnings = np.full((len(families), int(lengths.max())), PAD, np.int32)
    for row, family in enumerate(families):
        beginnings[row, : family.shared] = texts[family.members[0]].ids[: family.shared]
    parents = np.repeat(np.arange(len(families)), [len(family.members) for family in families])
    return Branches(samples, tokens, targets, beginnings, lengths, parents)
