"""Beam search by the rules of fairseq."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moekit.generation.request import Generation, Request
from moekit.generation.session import Session
from moekit.symbols import EOS
from moekit.worker.sampling import Candidates

if TYPE_CHECKING:
    from tqdm import tqdm

    from moekit.data.codec import Codec, Ids
    from moekit.handle import Handle


@dataclass(frozen=True)
class Hypothesis:
    """A beam: its new tokens and their log-probabilities; ``score`` is the sum of these and of the prompt's."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    score: float = 0.0
    # The number of the beam that this one continues.
    parent: int = 0


class Beams:
    """The beam search of one prompt, by the rules of ``SequenceGenerator`` (fairseq/sequence_generator.py).

    The prompt's number is ``prompt``, and it has ``length`` ids, the leading symbol included.

    Of the 2 N best candidates, those with ``</s>`` among the first N are finished hypotheses, and the first N others
    continue. The search ends when N hypotheses are finished. They are ranked by the mean log-probability of all their tokens.
    """

    def __init__(self, prompt: int, length: int, size: int):
        self.prompt, self.length, self.size = prompt, length, size
        self.alive = [Hypothesis()]
        self.finished: list[tuple[float, str, Hypothesis]] = []
        # Whether the model gave numbers for all beams.
        self.finite = True

    def grow(self, candidates: Candidates, last: bool) -> None:
        alive = []
        *columns, finite = candidates
        self.finite &= bool(finite)
        for place, (score, token, beam, logprob) in enumerate(zip(*columns, strict=True)):
            before = self.alive[beam]
            ids, logprobs = (*before.ids, int(token)), (*before.logprobs, float(logprob))
            hypothesis = Hypothesis(ids, logprobs, float(score), int(beam))
            if token != EOS:
                alive.append(hypothesis)
            elif place < self.size and len(self.finished) < self.size:
                mean = float(np.float32(score) / np.float32(self.length - 1 + len(ids)))
                self.finished.append((mean, "length" if last else "stop", hypothesis))
        self.alive = [] if last or len(self.finished) == self.size else alive[: self.size]

    def best(self, count: int, codec: Codec | Ids) -> list[Generation]:
        """The ``count`` best finished hypotheses, best first; their text excludes the ``</s>`` at the end."""
        # What is not a number comes last.
        ranked = sorted(self.finished, key=lambda found: (math.isnan(found[0]), -found[0]))[:count]
        return [
            Generation(
                prompt=self.prompt,
                text=codec.decode(hypothesis.ids[:-1]) if codec.reads_text else None,
                ids=list(hypothesis.ids),
                logprobs=np.array(hypothesis.logprobs, np.float32),
                finish_reason=reason,
                score=mean,
            )
            for mean, reason, hypothesis in ranked
        ]


def search(model: Handle, request: Request, bar: tqdm) -> tuple[list[Generation], list[int]]:
    """The best hypotheses of each prompt, prompt by prompt; and the prompts for which the model did not always give numbers."""
    best, bad = [], []
    for wave in request.waves(model):
        lengths = request.lengths[wave.start : wave.stop].tolist()
        searches = {
            number: Beams(number, length, request.settings.beam_size)
            for number, length in zip(wave, lengths, strict=True)
        }
        with Session(model, wave, request) as session:
            numbers, found = session.begin()
            for step in range(1, request.max_new_tokens + 1):
                for number, *row in zip(numbers.tolist(), *found, strict=True):
                    searches[number].grow(Candidates(*row), last=step == request.max_new_tokens)
                    bar.update()
                alive = {
                    number: [(beam.parent, beam.ids[-1], beam.score) for beam in one.alive]
                    for number, one in searches.items()
                    if one.alive
                }
                if not alive:
                    break
                numbers, found = session.search(alive, last=step + 1 == request.max_new_tokens)
        for number, one in searches.items():
            best += one.best(request.copies, request.codec)
            if not one.finite:
                bad.append(number)
    return best, bad
